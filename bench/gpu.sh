#!/usr/bin/env bash
# Everything that wants a GPU, in at most nine minutes: bench/gpu.py says what.
#
#     bash bench/gpu.sh                        all of it, into out/gpu
#     bash bench/gpu.sh --device cpu --toy     toys, without a GPU
set -euo pipefail
cd "$(dirname "$0")/.."                        # the root, where every program starts
export PYTHONUNBUFFERED=1                      # a row is there when it was measured
export CUBLAS_WORKSPACE_CONFIG=:4096:8         # the tests want the same bits twice
exec python3 -m bench.gpu "$@"
