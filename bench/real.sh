#!/usr/bin/env bash
# Every run behind RESULTS.md's table of a real Llama. Each is trained into $OUT/NAME and evaluated into $OUT/NAME.json, two
# at a time on one thread each. A run that is there is not made again, one that was stopped goes on. Then bench/real.py
# makes the table. It wants what README's walk leaves, shards of another text ($OTHER), the files of the tasks
# (python -m tasks.download) and llama.cpp's llama-quantize; without the last, f16 and q8_0 are all encodings.
#
#     bash bench/real.sh               all of it, after README's walk: some seven hours on two cores, three in bf16
#     bash bench/real.sh depth         only the runs whose names begin so (and what they start from)
#     bash bench/real.sh --list        print the runs, run nothing
#
# What can be set, with a laptop's values. On a processor with avx512_bf16 or amx, and on one GPU, for example:
#     FLAGS="--laptop --autocast bfloat16" EVAL="--autocast bfloat16" bash bench/real.sh
#     FLAGS="--budgets 1.0 0.9 0.8 0.6 --steps 5000 --batch-tokens 32768 --seq-len 2048 --lr 1e-4" STEPS=5000 ROWS= JOBS=1 \
#         WRITE="--tokens 170000000" bash bench/real.sh
set -euo pipefail
cd "$(dirname "$0")/.."                          # the root, where every program starts
export OUT=${OUT:-out/real}                      # where runs go
ONLY=${1:-}                                      # results of a part do not replace the committed ones
ASSETS=${ASSETS:-$([ -z "$ONLY" ] && echo assets || echo "$OUT")}
export LLAMA=${LLAMA:-out/smollm2}               # what training starts from
DIM=${DIM:-576} HEADS=${HEADS:-9} FFN=${FFN:-1536} LAYERS=${LAYERS:-30}  # its shape
export DATA=${DATA:-data/novels}                 # what training reads;
OTHER=${OTHER:-data/wikitext-2}                  # other text, for one run;
export OWN=${OWN:-$OUT/own}                      # and what the Llama wrote itself, for another: made here
export TEXT=${TEXT:-book.txt} TASK_DIR=${TASK_DIR:-data/tasks}  # what judges: no training reads it
export TASKS=${TASKS:-piqa arc_easy winogrande lambada_openai}
export HELDOUT=${HELDOUT:---windows 32 --seq-len 256}  # and of what training reads, the part that is held out
export ROWS=${ROWS---limit 200}                  # of a task; ROWS= for all
export MMLU=${MMLU---limit 4}                    # of each of MMLU's subjects: five examples make its questions long
export FLAGS=${FLAGS:---laptop}                  # of every training,
export EVAL=${EVAL:-}                            # and of every evaluation
STEPS=${STEPS:-110}                              # what FLAGS makes of --steps
export WRITE=${WRITE:---tokens 60000}            # how much it writes
export QUANTIZE=${QUANTIZE:-llama-quantize}      # llama.cpp's program for encodings, and which
export KINDS=${KINDS:-f16 q8_0$(command -v "$QUANTIZE" >/dev/null && echo " q5_0 q4_0")}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

runs() {  # NAME FLAGS of train.py, or of search; base and cut-B train nothing
    echo "base"
    echo "family"
    # What more tokens buy
    echo "long --steps $((4 * STEPS))"
    # Models alone have no teacher; this family has none either
    echo "plain --kd 0"
    # From what the router may choose: whole layers cost a hair more than their share
    echo "depth --dim-choices $DIM --n-heads-choices $HEADS --ffn-dim-choices $FFN --budgets 1.0 0.901 0.801 0.601"
    echo "width --n-layers-choices $LAYERS"
    # The family's slices: without training; alone on the tokens that their size got in the family; on all its tokens
    for b in 0.90 0.80 0.60; do echo "cut-$b"; done
    for b in 1.00 0.90 0.80 0.60; do echo "own-$b --llama $OUT/cut-$b --budgets 1.0"; done
    for b in 0.80 0.60; do echo "all-$b --llama $OUT/cut-$b --budgets 1.0 --steps $((4 * STEPS))"; done
    # Another paper's way to these sizes, without training
    for b in 0.90 0.80 0.60; do
        echo "search-$b --budget $b --generations 6 --population 12 --fitness-windows 4 --calibration-windows 64" \
             "--report-windows 16 --seq-len 256"
    done
    # What training reads, on as many tokens as own-0.60: other text, and none at all
    echo "text-0.60 --llama $OUT/cut-0.60 --budgets 1.0 --data $OTHER"
    echo "written-0.60 --llama $OUT/cut-0.60 --budgets 1.0 --data $OWN"
    # Sizes x bits
    echo "quantised --budgets 1.0 0.8 0.6"
}

write() {  # the Llama's own text, as shards
    # shellcheck disable=SC2086
    [ -d "$OWN" ] || python -m bench.own_text --model "$LLAMA" --out "$OWN" $WRITE
}

make() {  # NAME FLAGS: what is evaluated
    local name=$1
    shift
    # shellcheck disable=SC2086  # FLAGS is a list of words
    case "$name" in
        base | cut-* | quantised) ;;
        search-*) [ -e "$OUT/$name/params.json" ] ||
            python -m search --llama "$LLAMA" --data "$DATA" --out "$OUT/$name" "$@" --resume ;;
        written-*) write && train "$name" "$@" ;;
        *) train "$name" "$@" ;;
    esac
}

train() {  # NAME FLAGS
    local name=$1
    shift
    # shellcheck disable=SC2086
    python train.py --llama "$LLAMA" --data "$DATA" --out "$OUT/$name" $FLAGS "$@" --save-every 10 --resume
}

judge() {  # NAME FLAGS: its figures, as JSON
    local model=$OUT/$1 at=1.0 some=""  # some: where MMLU is asked
    case "$1" in
        base) model=$LLAMA some=1.0 ;;
        family) at="1.0 0.9 0.8 0.7 0.6 0.5" some="1.0 0.8 0.6" ;;
        long) at="1.0 0.9 0.8 0.7 0.6 0.5" ;;
        depth) at="1.0 0.901 0.801 0.601" ;;
        width | plain) at="1.0 0.9 0.8 0.6" ;;
    esac
    shift
    # shellcheck disable=SC2086  # KINDS, TASKS, ROWS, MMLU, HELDOUT, EVAL, at and some are lists of words
    case "$model" in
        */quantised) python -m bench.quantised --model "$OUT/family" "$@" --text "$TEXT" --kinds $KINDS \
            --llama-quantize "$QUANTIZE" --json ;;
        *) python eval.py --model "$model" --budgets $at --text "$TEXT" --seq-len 1024 --tasks $TASKS \
            --task-dir "$TASK_DIR" $ROWS $EVAL --json &&
            python eval.py --model "$model" --budgets $at --data "$DATA" $HELDOUT $EVAL --json &&
            { [ -z "$some" ] || python eval.py --model "$model" --budgets $some --data "$DATA" --windows 1 \
                --seq-len 2048 --tasks mmlu --task-dir "$TASK_DIR" $MMLU $EVAL --json; } ;;
    esac
}

run() {  # NAME FLAGS: what is not there yet
    local at="$OUT/$1"
    [ -s "$at.json" ] && return
    if make "$@" >>"$at.log" 2>&1 && judge "$@" >"$at.part" 2>>"$at.log"; then
        mv "$at.part" "$at.json" && echo "$1: done"
    else
        echo "$1: see $at.log"
        return 1
    fi
}
export -f write make train judge run

[ "$ONLY" = --list ] && { runs; exit; }
runs | grep -e "^$ONLY" >/dev/null || { echo "no run begins with $ONLY; see bash bench/real.sh --list" >&2 && exit 2; }
for path in "$LLAMA" "$DATA" "$OTHER" "$TEXT" "$TASK_DIR"; do
    [ -e "$path" ] || { echo "error: $path is not there; expected what the head of bench/real.sh names" >&2 && exit 2; }
done
mkdir -p "$OUT"
run base    # no table without it
run family
[ -e "$OUT/scratch-1.00" ] ||  # the last that it makes
    python -m bench.alone --model "$OUT/family" --base "$LLAMA" --out "$OUT"
runs | grep -e "^$ONLY" | xargs -P "${JOBS:-2}" -I{} bash -c 'run {}' || failed=$?
python -m bench.real --collect "$OUT" --assets "$ASSETS"
exit "${failed:-0}"
