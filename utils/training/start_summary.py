"""What a run prints before its first step."""

from typing import TYPE_CHECKING

from torch import nn

from utils.runtime import distributed, progress
from utils.runtime.progress import Position
from utils.runtime.text import count, printable

if TYPE_CHECKING:
    from utils.training.run import Run, Training


def print_network(run: "Run", label: str, model_name: str, network: nn.Module, tag: str | None = None) -> None:
    """Print a network's model, its size, and the origin of its weights. tag: of timm's pretrained weights."""
    total = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    only = f", of which {trained:,} are trained" if trained != total else ""
    if total == 0:
        origin = "none to learn"
    elif run.state is not None:
        origin = f"those of {run.args.resume}"
    elif run.weights is not None:
        origin = f"those of {run.weights.path}"
    else:
        origin = f"timm's {tag}" if tag else f"random (--seed {run.args.seed})"
    progress.say(f"{label}: {model_name}, {total:,} parameters{only}; weights: {origin}")


def print_plan(run: "Run", training: "Training") -> None:
    """Print, before the first step, where the run starts, its batches and its learning rates."""
    args, start, sampler = run.args, run.start, training.data.sampler
    if start != Position():
        progress.say(f"resumed: {args.resume}, at step {start.step} of epoch {start.epoch} (both count from 0)")
    steps = sampler.num_images // sampler.global_batch  # of a whole epoch, whatever the number of processes before
    processes, micro_batches = distributed.world_size(), training.settings.micro_batches
    accumulated = f" x {micro_batches} micro-batches" if micro_batches > 1 else ""
    progress.say(
        f"global batch: {processes} {'process' if processes == 1 else 'processes'} x {args.batch_size}"
        f"{accumulated} = {sampler.global_batch} images; {steps} steps an epoch, {count(args.epochs, 'epoch')} in all"
    )
    if (weights := training.settings.class_weights) is not None:
        listed = (f"{weights[i].item():.3g} ({run.splits.classes[i]})" for i in (weights.argmin(), weights.argmax()))
        progress.say(
            printable(f"--class-weights {args.class_weights}: {' to '.join(listed)}; their mean over images is 1")
        )
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (args.mean, args.std))
    color = "grey" if args.gray else "RGB"
    progress.say(f"images: {color}, crops of {args.train_crop_size} pixels, --mean {mean} --std {std}")
    rates = ", ".join(f"{name.removeprefix('lr_')} {rate:g}" for name, rate in training.learning_rates().items())
    progress.say(
        f"learning rates of epoch {start.epoch}: {rates}; --opt {args.opt}, --lr-scheduler {args.lr_scheduler}"
    )
    if training.state.ema is not None and (warning := training.state.ema.warning(steps, args.epochs)):
        progress.say(warning)
