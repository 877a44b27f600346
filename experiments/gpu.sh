#!/usr/bin/env bash
# As many whole runs as fit MINUTES on the GPUs of this machine, several side by side: bash experiments/gpu.sh DATA [PLAN...]
# Small results go to $OUT (experiments/results). What is finished there, or in experiments/results, is not run again, so
# that the same command goes on with what is missing, on another machine too if its results were copied back.
# DATA holds {train,val,test}/<class>/<image>, mini-RIN; PLANs are names in experiments/plans, the most important first.
set -euo pipefail
data=$(realpath "${1:?usage: bash experiments/gpu.sh DATA [PLAN...]}")
shift
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-experiments/results}
MINUTES=${MINUTES:-9}
JOBS=${JOBS:-6}
CACHE=${CACHE:-$(mktemp -d)}
FLAGS=${FLAGS:-"--device cuda --amp --workers 1 --print-freq 1000"}
[ $# -gt 0 ] || set -- classification forms unseen sensitivity
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
mkdir -p "$OUT"
if [ -d experiments/results ] && [ ! experiments/results -ef "$OUT" ]; then
    cp -r --no-clobber experiments/results/. "$OUT"
fi

end=$((SECONDS + MINUTES * 60))
for plan in "$@"; do
    left=$(((end - SECONDS) / 60))
    [ "$left" -gt 0 ] || break
    echo "== $plan, at most $left minutes"
    "$PYTHON" experiments/run.py "experiments/plans/$plan.py" --data-path "$data" \
        --exclude experiments/mini_rin_exclude.txt -o "$OUT/$plan" --jobs "$JOBS" --minutes "$left" \
        --flags "$FLAGS --cache-dir $CACHE"
    "$PYTHON" experiments/analyse.py "experiments/plans/$plan.py" "$OUT/$plan" || true  # of what is there so far
done
