#!/usr/bin/env bash
# Run plans on the GPUs of this machine for MINUTES, several runs at a time: bash experiments/gpu.sh DATA [PLAN...]
# DATA: mini-RIN, as {train,val,test}/<class>/<image>; PLANs: names in experiments/plans, the most important first.
# Results go to $OUT (default: experiments/results). Runs that are finished there or in experiments/results are skipped,
# and unfinished runs in $OUT are resumed, so the same command continues, also on another machine with a copy of $OUT.
# If a run of a plan fails, the other plans still run, and the exit code is 1.
set -euo pipefail
data=$(realpath "${1:?usage: bash experiments/gpu.sh DATA [PLAN...]}")
shift
OUT=${OUT:+$(realpath -m "$OUT")}  # relative to the folder of the call
CACHE=${CACHE:+$(realpath -m "$CACHE")}
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-experiments/results}
MINUTES=${MINUTES:-9}
JOBS=${JOBS:-6}
FLAGS=${FLAGS:-"--device cuda --amp --workers 1 --print-freq 1000"}
[ $# -gt 0 ] || set -- small_resnet18 classification
if [ -z "$CACHE" ]; then
    CACHE=$(mktemp -d)
    trap 'rm -rf "$CACHE"' EXIT
fi
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
mkdir -p "$OUT"

running="" stopped="" failed=0
trap 'stopped=1; [ -z "$running" ] || kill -TERM "$running" 2> /dev/null || true' INT TERM HUP
end=$((SECONDS + MINUTES * 60))
for plan in "$@"; do
    left=$(((end - SECONDS) / 60))
    [ "$left" -gt 0 ] && [ -z "$stopped" ] || break
    for finished in experiments/results/"$plan"/*/seed*/finished.json; do
        from=$(dirname "$finished") to=$OUT/$(dirname "${finished#experiments/results/}")
        if [ -e "$finished" ] && [ ! -e "$to/finished.json" ]; then  # whole runs only, each by one rename
            rm -rf "$to" "$to.tmp"
            mkdir -p "$(dirname "$to")"
            cp -r "$from" "$to.tmp"
            mv "$to.tmp" "$to"
        fi
    done
    echo "== $plan, at most $left minutes"
    "$PYTHON" experiments/run.py "experiments/plans/$plan.py" --data-path "$data" \
        --exclude experiments/mini_rin_exclude.txt -o "$OUT/$plan" --jobs "$JOBS" --minutes "$left" \
        --flags "$FLAGS --cache-dir $CACHE" &
    running=$!
    wait "$running" || wait "$running" || failed=1  # a signal ends the first wait; the runs then save and exit
    running=""
    "$PYTHON" experiments/analyse.py "experiments/plans/$plan.py" "$OUT/$plan" || true  # of the runs finished so far
done
exit "$failed"
