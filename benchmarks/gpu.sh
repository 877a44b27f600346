#!/usr/bin/env bash
# All measurements and tests on a GPU, in at most 15 minutes: bash benchmarks/gpu.sh [DATA]
# DATA: real images in {train,val}/<class>/<image>, such as mini-RIN; generated images if omitted.
# Tables and curves go to $OUT. If a part fails, the others still run, and the exit code is 1.
# PARTS="steps curves" runs only these parts.
set -uo pipefail
data=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
PARTS=${PARTS:-steps loading curves profiles tests}
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
part steps 300 "${measure[@]}" --rows 1 2 3 4 10 11 --repeats 3 --output "$OUT/steps"
part loading 250 "${measure[@]}" --rows 5 9 --repeats 3 --output "$OUT/loading"
part curves 100 "$PYTHON" -m benchmarks.curves --device cuda "${from[@]}" --steps 100 \
    --scripts _policy_gradient --settings bf16 "bf16 compile" --output "$OUT"
part profiles 100 "$PYTHON" -m benchmarks.profiles --device cuda --output "$OUT"
part tests 130 "$PYTHON" -m pytest -p no:cacheprovider tests/training/test_cuda.py

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all parts done; the results are in $OUT"
