#!/usr/bin/env bash
# The worked example of docs/example.md: generated images, audited; a classifier pretrained on masked images by two CPU
# processes, averaged, fine-tuned, tested; a report, weights to pass on, and what they say of single images.
# Usage: demo.sh OUTPUT. A new run starts in a new folder: remove OUTPUT first, or name another.
set -euo pipefail
cd "$(dirname "$0")"
output=${1:-demo}
if [ -e "$output" ]; then
    echo "error: $output already exists; remove it, or give another folder (make demo DEMO=FOLDER)." >&2
    exit 2
fi
run() { echo "> $*"; "$@"; }
small="--device cpu --workers 1 --train-crop-size 64 --val-resize-size 72 --val-crop-size 64"

run python -m utils.phantoms "$output/data"
# A slip as real sets have them: a test image in the training set, under another label.
run cp "$output/data/test/ct-head-infarct/00000.png" "$output/data/train/ct-head-normal/slip.png"
run python -m utils.audit "$output/data" -o "$output/audit" --exclude-list "$output/exclude.txt"
run torchrun --nproc_per_node=2 --standalone _policy_gradient/train.py --data-path "$output/data" $small \
    --model resnet10t --batch-size 16 --lr 0.01 --epochs 6 --grid 16 --kernel 5 --sigma 2 \
    --exclude "$output/exclude.txt" --gray --mean 0.2932 --std 0.2950 --plot-every 3 --output-dir "$output/pretrained"
run python -m _policy_gradient.gallery "$output/pretrained" --classes ct-head-haemorrhage,mr-brain-tumour,us-breast-cyst
run python -m utils.weight_averaging "$output"/pretrained/model_{3,4,5}.pth -o "$output/heated.pth"
run torchrun --nproc_per_node=2 --standalone _normal/train.py --data-path "$output/data" $small \
    --finetune "$output/heated.pth" --exclude "$output/exclude.txt" --batch-size 16 --opt adamw --lr 0.001 --epochs 6 \
    --lr-scheduler cosineannealinglr --plot-every 3 --output-dir "$output/finetuned"
run torchrun --nproc_per_node=2 --standalone _normal/train.py --data-path "$output/data" --device cpu --workers 1 \
    --resume "$output/finetuned/model_best.pth" --test-only --split test
run python -m utils.plots curves "$output/pretrained" "$output/finetuned" -o "$output/curves.png"
run python -m utils.plots confusion "$output/finetuned"
run python -m utils.report "$output/pretrained" "$output/finetuned" -o "$output/report.html"
run python -m utils.export "$output/finetuned/model_best.pth" -o "$output" --data-name phantoms
run python -m utils.predict "$output/resnet10t_finetuned_phantoms/resnet10t_finetuned_phantoms.safetensors" \
    "$output/data/test/us-breast-cyst" --device cpu
