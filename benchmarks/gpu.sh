#!/usr/bin/env bash
# All that a GPU must show, in one command and about ten minutes: bash benchmarks/gpu.sh [DATA]
# DATA holds {train,val}/<class>/<image> of real images (mini-RIN, say); without it, generated images are used.
# The tables, curves and profiles go to $OUT; one part's failure does not stop the others, but shows in the exit code.
# PARTS="steps curves" runs only these, where a machine is lent for less time.
set -uo pipefail
data=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
PARTS=${PARTS:-steps loading profiles curves tests}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
failed=()

part() {  # NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    [[ " $PARTS " == *" $name "* ]] || return 0
    echo "== $name: $* (at most $seconds s)"
    local start=$SECONDS
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$OUT/gpu_$name.log"
    local code=${PIPESTATUS[0]}
    echo "== $name: exit code $code after $((SECONDS - start)) s"
    if [ "$code" -ne 0 ]; then failed+=("$name ($code)"); fi
}

from=(${data:+--data "$data"})
measure=("$PYTHON" -m benchmarks.run --device cuda "${from[@]}")
part steps 200 "${measure[@]}" --rows 1 2 3 4 --repeats 3 --output "$OUT/steps"
part loading 190 "${measure[@]}" --rows 5 9 --repeats 3 --output "$OUT/loading"
part profiles 60 "$PYTHON" -m benchmarks.profiles --device cuda --output "$OUT"
part curves 100 "$PYTHON" -m benchmarks.curves --device cuda "${from[@]}" --steps 100 \
    --scripts _policy_gradient --settings bf16 "bf16 compile" --output "$OUT"
part tests 130 "$PYTHON" -m pytest -p no:cacheprovider tests/training/test_cuda.py

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all parts done; the results are in $OUT"
