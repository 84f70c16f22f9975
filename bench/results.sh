#!/usr/bin/env bash
# Every run behind RESULTS.md's pages of small Llamas: the demo (section 8) and stories260K (sections 2 to 5). Each is
# trained into out/results/NAME and evaluated into NAME.json, two at a time on one thread each. A run that is there is not
# made again, one that was stopped goes on. Then bench/results.py makes the tables and the picture.
#
#     bash bench/results.sh            all of it: the demo some three hours on two cores, stories260K one (computed)
#     bash bench/results.sh width      only the runs whose names begin so (and what they start from)
#     bash bench/results.sh --list     print the runs, run nothing
#
# What can be set, with the demo's values. stories260K's page (its results go to $ASSETS/results.json):
#     LLAMA=out/stories260K DIM=64 HEADS=8 FFN=172 LAYERS=5 DEPTH="1.0 0.81 0.65 0.41" KDS="0 1" STEPS=600 \
#         SCRATCH="--steps 2400 --lr 3e-3" OUT=out/stories ASSETS=assets/stories \
#         FLAGS="--kd 0.5 --data data/stories260K --seq-len 128 --eval-windows 80 --calibration-windows 64" \
#         bash bench/results.sh
set -euo pipefail
cd "$(dirname "$0")/.."                # the root, where every program starts
export OUT=${OUT:-out/results}         # where runs go
ONLY=${1:-}                            # results of a part do not replace the committed ones
ASSETS=${ASSETS:-$([ -z "$ONLY${LLAMA:-}" ] && echo assets || echo "$OUT")}
export LLAMA=${LLAMA:-}                # what training starts from; none: the demo trains its base
DIM=${DIM:-128} HEADS=${HEADS:-8} FFN=${FFN:-384} LAYERS=${LAYERS:-8}  # its shape
export DEPTH=${DEPTH:-1.0 0.8 0.65 0.4}  # budgets of which whole layers buy something
export STEPS=${STEPS:-900} BATCH=${BATCH:-512}  # of a family: steps, tokens per budget and step
SCRATCH=${SCRATCH:---steps $((4 * STEPS + 2400)) --lr 3e-3}  # from fresh weights: the base's tokens too, and its rate
export FLAGS=${FLAGS:---kd 0}           # of every training; the demo's base is no teacher
KDS=${KDS:-0.5 1}                      # other shares of it
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export AT="1.0 0.95 0.9 0.85 0.8 0.75 0.7 0.65 0.6 0.55 0.5 0.45 0.4"  # 13 budgets; 1.0, 0.8, 0.6 and 0.4 are trained

runs() {  # NAME FLAGS of train.py
    for s in 0 1 2; do
        echo "router-$s --seed $s"
        # Meeting a budget
        echo "penalty-$s --router penalty --seed $s"
        # What chooses, and from what
        echo "frozen-$s --freeze-backbone --seed $s"
        echo "random-$s --router random --seed $s"
        echo "uniform-$s --router uniform --seed $s"
        echo "width-$s --n-layers-choices $LAYERS --seed $s"
        echo "depth-$s --dim-choices $DIM --n-heads-choices $HEADS --ffn-dim-choices $FFN --n-layers-choices" \
             "$(seq -s " " "$LAYERS") --budgets $DEPTH --seed $s"
        # What teaches the router: the paper's soft passes
        echo "soft-$s --teach soft --seed $s"
        # One family against models that train alone, of the shapes that router-0 chose, on the tokens that their size
        # got in the family, in as many steps
        for b in 1.00 0.80 0.60 0.40; do
            echo "same-$b-$s --llama $OUT/cut-$b --budgets 1.0 --seed $s"
        done
    done
    # Alone again: on the tokens of the whole family, in four times as many steps; and from fresh weights
    for b in 1.00 0.80 0.60 0.40; do
        echo "whole-$b-0 --llama $OUT/cut-$b --budgets 1.0 --steps $((4 * STEPS))"
        echo "scratch-$b-0 --llama $OUT/scratch-$b --budgets 1.0 $SCRATCH"
    done
    # One change at a time. The same tokens in fewer and larger steps, and in more and smaller ones
    echo "steps-half --steps $((STEPS / 2)) --batch-tokens $((2 * BATCH))"
    echo "steps-double --steps $((2 * STEPS)) --batch-tokens $((BATCH / 2))"
    for rate in 1e-3 4e-3; do echo "lr-$rate --lr $rate"; done
    echo "modulation-none --modulation none"
    # How fast the router learns, and from how many passes
    for rate in 2e-4 2e-3 4e-2; do echo "router-lr-$rate --router-lr $rate"; done
    for share in 0 0.25; do echo "teach-$share --teach-prob $share"; done
    echo "tau-1 --tau-end 1"
    # Distillation
    for share in $KDS; do echo "kd-$share --kd $share"; done
    # Importance
    for order in random reversed; do echo "units-$order --units-by $order"; done
    echo "depth-by-influence --depth-by influence"
}

budgets() {  # NAME: where a family is evaluated
    case "$1" in
        depth-[0-9]) echo "$AT $DEPTH" ;;
        *) echo "$AT" ;;
    esac
}

run() {  # NAME FLAGS: train from the base, if FLAGS name no other start, and evaluate
    [ -s "$OUT/$1.json" ] && return
    local name=$1 start=${LLAMA:-$OUT/base} at
    at=$(budgets "$1")
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
export -f budgets run

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
        # shellcheck disable=SC2046
        python eval.py --model "$OUT/$name" --budgets $(budgets "$name") --windows 1 --speed --json \
            >"$OUT/$name.part" 2>>"$OUT/$name.log"
        mv "$OUT/$name.part" "$OUT/$name.speed"
    }
done
python -m bench.results --collect "$OUT" --assets "$ASSETS"
exit "${failed:-0}"
