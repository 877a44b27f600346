#!/usr/bin/env bash
# The whole route on generated phantoms with two CPU processes: pretrain with the policy, average, fine-tune, evaluate.
# Usage: demo.sh OUTPUT. A new run starts in a new folder: remove OUTPUT first, or name another.
set -euo pipefail
cd "$(dirname "$0")"
output=$(realpath -m "${1:-demo}")
if [ -e "$output" ]; then
    echo "error: $output is there already; remove it, or give another folder (make demo DEMO=FOLDER)." >&2
    exit 2
fi
small=(--device cpu --workers 1 --train-crop-size 64 --val-resize-size 72 --val-crop-size 64 --print-freq 10)
two="torchrun --nproc_per_node=2 --standalone"

echo "1/4 pretraining: a policy network masks each image"
$two _policy_gradient/train.py "${small[@]}" --model resnet10t --batch-size 16 --lr 0.01 --epochs 4 \
    --grid 16 --kernel 5 --sigma 2 --output-dir "$output/pretrained"
echo "2/4 averaging the last three epochs"
python -m utils.weight_averaging "$output"/pretrained/model_{1,2,3}.pth -o "$output/heated.pth"
echo "3/4 fine-tuning without masks"
$two _normal/train.py "${small[@]}" --finetune "$output/heated.pth" --batch-size 16 --opt adamw --lr 0.001 --epochs 4 \
    --lr-scheduler cosineannealinglr --output-dir "$output/finetuned"
echo "4/4 evaluating on the test split"
$two _normal/train.py --device cpu --workers 1 --resume "$output/finetuned/checkpoint.pth" --test-only --split test

echo "Pretraining: $output/pretrained (log.jsonl)"
echo "Heated weights: $output/heated.pth"
echo "Fine-tuned model, log, metrics.json and per_class.csv: $output/finetuned"
