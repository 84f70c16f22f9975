#!/usr/bin/env bash
# Every run behind the first half of RESULTS.md. Each is trained into out/results/NAME and evaluated into NAME.json, two
# at a time on one thread each. A run that is there is not made again, one that was stopped goes on. Then
# bench/results.py makes the tables and the picture.
#
#     bash bench/results.sh            all of it; RESULTS.md says how long that takes
#     bash bench/results.sh width      only the runs whose names begin so (and what they start from)
#     bash bench/results.sh --list     print the runs, run nothing
#
# What can be set, with the demo's values. Another Llama on one GPU, for example:
#     LLAMA=Llama-3.2-1B DIM=2048 HEADS=32 FFN=8192 LAYERS=16 STEPS=5000 BATCH=131072 FLAGS="--data data/web" \
#         SCRATCH="--steps 25000 --lr 3e-4" JOBS=1 OUT=out/1b bash bench/results.sh
set -euo pipefail
cd "$(dirname "$0")/.."                # the root, where every program starts
export OUT=${OUT:-out/results}         # where runs go
ONLY=${1:-}                            # results of a part do not replace the committed ones
ASSETS=${ASSETS:-$([ -z "$ONLY${LLAMA:-}" ] && echo assets || echo "$OUT")}
export LLAMA=${LLAMA:-}                # what training starts from; none: the demo trains its base
DIM=${DIM:-128} HEADS=${HEADS:-8} FFN=${FFN:-384} LAYERS=${LAYERS:-8}  # its shape
export STEPS=${STEPS:-450} BATCH=${BATCH:-1024}  # of a family: steps, tokens per budget and step
SCRATCH=${SCRATCH:---steps $((4 * STEPS + 1200)) --lr 3e-3}  # from fresh weights: the base's tokens and its rate
# For every training. These are the settings that RESULTS.md was measured at; train.py's defaults have moved on.
export FLAGS=${FLAGS:---lr 1e-3 --base-steps 1200 --teach soft --router-lr 1.4e-3 --modulation-lr 1.4e-3 --teach-end 0.45 --kd 0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export AT="1.0 0.95 0.9 0.85 0.8 0.75 0.7 0.65 0.6 0.55 0.5 0.45 0.4"  # 13 budgets; 1.0, 0.8, 0.6 and 0.4 are trained

runs() {  # NAME FLAGS of train.py
    for s in 0 1 2; do
        echo "router-$s --seed $s"
        # One family against models that train alone, of the shapes that router-0 chose: on the tokens that their size
        # got in the family, in as many steps, and on those of the whole family, in four times as many
        for b in 1.00 0.80 0.60 0.40; do
            echo "same-$b-$s --llama $OUT/cut-$b --budgets 1.0 --seed $s"
            echo "whole-$b-$s --llama $OUT/cut-$b --budgets 1.0 --steps $((4 * STEPS)) --seed $s"
        done
        # Meeting a budget
        echo "penalty-$s --router penalty --seed $s"
        # What chooses, and from what. Depth alone has nothing at .6: .65 buys 5 of 8 layers
        echo "frozen-$s --freeze-backbone --seed $s"
        echo "random-$s --router random --seed $s"
        echo "uniform-$s --router uniform --seed $s"
        echo "width-$s --n-layers-choices $LAYERS --seed $s"
        echo "depth-$s --dim-choices $DIM --n-heads-choices $HEADS --ffn-dim-choices $FFN --n-layers-choices" \
             "$(seq -s " " "$LAYERS") --budgets 1.0 0.8 0.65 0.4 --seed $s"
    done
    # Alone again: own tokens in four times as many steps; all tokens in as many steps as the family, or at three times
    # the rate; and from fresh weights, on the base's tokens too
    for b in 1.00 0.80 0.60 0.40; do
        echo "small-$b-0 --llama $OUT/cut-$b --budgets 1.0 --steps $((4 * STEPS)) --batch-tokens $((BATCH / 4))"
        echo "large-$b-0 --llama $OUT/cut-$b --budgets 1.0 --batch-tokens $((4 * BATCH))"
        echo "high-$b-0 --llama $OUT/cut-$b --budgets 1.0 --steps $((4 * STEPS)) --lr 3e-3"
        echo "scratch-$b-0 --llama $OUT/scratch-$b --budgets 1.0 $SCRATCH"
    done
    # One change at a time. The same tokens in more and smaller steps, or at three times the rate
    for n in 2 4; do
        echo "steps-x$n --steps $((n * STEPS)) --batch-tokens $((BATCH / n)) --router-lr 1.436e-3"
    done
    echo "lr-3e-3 --lr 3e-3"
    echo "modulation-none --modulation none"
    # What teaches the router, and how fast
    for share in 0 0.25; do echo "soft-$share --teach-prob $share"; done
    for rate in 4e-4 4e-3 4e-2; do echo "router-lr-$rate --router-lr $rate"; done
    echo "kappa-1 --kappa-end 1"
    echo "tau-1 --tau-end 1"
    # Distillation
    for share in 0.5 1; do echo "kd-$share --kd $share"; done
    # Importance
    for order in random reversed; do echo "units-$order --units-by $order"; done
    echo "depth-by-influence --depth-by influence"
}

run() {  # NAME FLAGS: train from the base, if FLAGS name no other start, and evaluate
    [ -s "$OUT/$1.json" ] && return
    local name=$1 start=${LLAMA:-$OUT/base} at=$AT
    shift
    case "$name $*" in
        *--llama*) start="" at=1.0 ;;
        router-0*) start=$LLAMA ;;  # the first one trains the demo's base
    esac
    # shellcheck disable=SC2086  # FLAGS and at are lists of words
    python train.py --out "$OUT/$name" --steps "$STEPS" --batch-tokens "$BATCH" ${start:+--llama "$start"} $FLAGS "$@" \
        --eval-every 1000000 --resume >>"$OUT/$name.log" 2>&1 &&
        python eval.py --model "$OUT/$name" --budgets $at --json >"$OUT/$name.part" 2>>"$OUT/$name.log" &&
        mv "$OUT/$name.part" "$OUT/$name.json" && echo "$name: done" || { echo "$name: see $OUT/$name.log"; return 1; }
}
export -f run

[ "$ONLY" = --list ] && { runs; exit; }
runs | grep -e "^$ONLY" >/dev/null || { echo "no run begins with $ONLY; see bash bench/results.sh --list" >&2 && exit 2; }
mkdir -p "$OUT"
run router-0 --seed 0
[ -e "$OUT/scratch-1.00" ] ||
    python -m bench.alone --model "$OUT/router-0" --base "${LLAMA:-$OUT/base}" --out "$OUT"
[ -s "$OUT/before.json" ] || {  # what training starts from: the same slices of the sorted, untrained base
    # shellcheck disable=SC2086
    python -m bench.before --model "$OUT/router-0" --base "${LLAMA:-$OUT/base}" --budgets $AT --json >"$OUT/before.part"
    mv "$OUT/before.part" "$OUT/before.json"
}
runs | grep -e "^$ONLY" | xargs -P "${JOBS:-2}" -I{} bash -c 'run {}' || failed=$?
for name in router-0 width-0 depth-0; do  # what a budget costs to run: one at a time, on a quiet machine
    [ ! -s "$OUT/$name.json" ] || [ -s "$OUT/$name.speed" ] || {
        # shellcheck disable=SC2086
        python eval.py --model "$OUT/$name" --budgets $AT --windows 1 --speed --json \
            >"$OUT/$name.part" 2>>"$OUT/$name.log"
        mv "$OUT/$name.part" "$OUT/$name.speed"
    }
done
python -m bench.results --collect "$OUT" --assets "$ASSETS"
exit "${failed:-0}"
