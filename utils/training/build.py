"""From the command line's values to the objects that both scripts share; the namespace goes no further than here."""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.checkpoints.checkpoint import Weights
from utils.data.dataset import BadImages
from utils.data.loaders import Wait, batch_seconds
from utils.data.samplers import TrainingSampler
from utils.data.splits import Splits, digests
from utils.data.transforms import BatchMixing, Normalize
from utils.results import provenance
from utils.runtime import distributed, progress
from utils.runtime.progress import Position
from utils.runtime.signals import wait_for
from utils.training import fitting as loading
from utils.training import models, optim, rehearsal
from utils.training.monitor import Pictures
from utils.training.saver import Saver
from utils.training.state import TrainingState


def bad_images(args: argparse.Namespace) -> BadImages:
    """What the loops and the evaluation tell of images that cannot be read; one for the whole run."""
    return BadImages(args.max_bad_images if args.bad_images == "skip" else None)


def wait(args: argparse.Namespace) -> Wait:
    """How evaluation alone waits for its batches; in training the saver does."""
    return partial(wait_for, seconds=batch_seconds(args.timeout))


def batch_mixing(args: argparse.Namespace, num_classes: int) -> BatchMixing:
    return BatchMixing(args.mixup_alpha, args.cutmix_alpha, num_classes, args.seed, distributed.rank())


def classifier(
    args: argparse.Namespace,
    classes: list[str],
    state: dict[str, Any] | None,
    weights: Weights | None,
    device: torch.device,
) -> nn.Module:
    """The classifier on its device, with the weights of the checkpoint, of the file, of timm's tag, or fresh ones."""
    starts_from_file = state is not None or weights is not None
    tag = None if starts_from_file else args.weights
    # A model built for one size is built as it was trained, with --test-only too.
    model = models.create_classifier(args.model, len(classes), args.train_crop_size, tag)
    if args.val_crop_size != args.train_crop_size:
        models.output_width(model, args.val_crop_size)
    if state is not None:
        models.load_classifier(model, state["model"], args.resume)
    elif weights is not None:
        loading.load_weights(model, weights, classes, args.test_only, progress.say)
    if args.sync_bn and device.type == "cpu":
        progress.say("--sync-bn: torch has no SyncBatchNorm for the CPU; the statistics stay those of each process.")
    if args.sync_bn:
        model = models.synchronize_batch_norm(model, device)
    return model.to(device, memory_format=memory_format(args, device))


def optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> Optimizer:
    groups = optim.parameter_groups(
        model,
        args.weight_decay,
        norm_weight_decay=args.norm_weight_decay,
        bias_weight_decay=args.bias_weight_decay,
        transformer_embedding_decay=args.transformer_embedding_decay,
    )
    return optim.build_optimizer(args.opt, groups, lr, args.momentum)


def scheduler(args: argparse.Namespace, of: Optimizer, first_epoch: int) -> LRScheduler:
    """The classifier's schedule, brought to `first_epoch`."""
    if args.lr_warmup_epochs >= args.epochs:
        progress.say(f"--lr-warmup-epochs {args.lr_warmup_epochs}: the run of {args.epochs} epochs ends within it.")
    return optim.build_scheduler(
        of,
        args.lr_scheduler,
        args.epochs,
        first_epoch=first_epoch,
        step_size=args.lr_step_size,
        gamma=args.lr_gamma,
        lr_min=args.lr_min,
        warmup_epochs=args.lr_warmup_epochs,
        warmup_method=args.lr_warmup_method,
        warmup_decay=args.lr_warmup_decay,
    )


def moving_average(args: argparse.Namespace, model: nn.Module) -> optim.MovingAverage | None:
    """The moving average of --model-ema, else None."""
    if not args.model_ema:
        return None
    return optim.MovingAverage(
        model,
        args.model_ema_decay,
        args.model_ema_steps,
        epochs=args.epochs,
        global_batch=args.batch_size * distributed.world_size(),
        warmup_epochs=args.lr_warmup_epochs,
    )


def saver(
    args: argparse.Namespace, script: str, splits: Splits, training: TrainingState, state: dict[str, Any] | None
) -> Saver:
    return Saver(
        Path(args.output_dir),
        training,
        origin={
            "script": script,
            "classes": splits.classes,
            "train_images": len(splits.training),
            "image_files": digests(splits),
            "args": vars(args),
        },
        start=Position.of(state),
        best_f1=state["best_f1"] if state else -1.0,
        checkpoint_steps=args.checkpoint_steps,
        timeout=args.timeout,
    )


def pictures(
    args: argparse.Namespace, splits: Splits, start: Position, draw_gallery: Callable[..., Any] | None = None
) -> Pictures:
    """What shows the epochs; draw_gallery: of the masks of a policy, after `epochs_done`. Rank 0 begins at once."""
    shown = Pictures(
        Path(args.output_dir),
        splits.classes,
        first_epoch=start.epoch,
        epochs=args.epochs,
        plot_every=args.plot_every,
        tensorboard=args.tensorboard,
        draw_gallery=draw_gallery,
    )
    if distributed.is_main_process():
        shown.begin(fresh=start == Position())
    return shown


def rehearse(
    args: argparse.Namespace,
    train: Callable[..., Any],
    evaluate: Callable[..., Any],
    training: TrainingState,
    splits: Splits,
    saver: Saver,
    device: torch.device,
) -> None:
    """One batch through the script's own passes, and room for what it writes; see `rehearsal.rehearse`."""
    rehearsal.rehearse(
        lambda loader: train(loader, saver=saver.idle(), label="rehearsal, epoch"),
        lambda loader: evaluate(loader=loader, label="rehearsal, evaluate"),
        training,
        training_split=splits.training,
        evaluation_split=splits.evaluation,
        batch_size=args.batch_size,
        seed=args.seed,
        output_dir=saver.output_dir,
        epochs_left=args.epochs - saver.position.epoch,
        device=device,
        compiled=args.compile,
    )


def write_provenance(
    args: argparse.Namespace,
    script: str,
    argv: Sequence[str] | None,
    splits: Splits,
    start: Position,
    device: torch.device,
) -> None:
    """Note this start in run.json, on rank 0."""
    if not distributed.is_main_process():
        return
    data = {"train": splits.training.files, "val": splits.evaluation.files}
    about = provenance.describe(script, argv, device)
    provenance.write_run(Path(args.output_dir), about, start, args.resume, data)


def print_network(
    args: argparse.Namespace,
    label: str,
    model_name: str,
    network: nn.Module,
    state: dict[str, Any] | None,
    weights: Weights | None,
    tag: str | None = None,
) -> None:
    """Print a network's model, its size, and where its weights come from. tag: one of timm's pretrained weights."""
    total = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    only = f", of which {trained:,} are trained" if trained != total else ""
    if total == 0:
        origin = "none to learn"
    elif state is not None or weights is not None:
        origin = f"those of {args.resume if state is not None else weights.path}"
    else:
        origin = f"timm's {tag}" if tag else f"random (--seed {args.seed})"
    progress.say(f"{label}: {model_name}, {total:,} parameters{only}; weights: {origin}")


def print_plan(
    args: argparse.Namespace,
    sampler: TrainingSampler,
    optimizers: dict[str, Optimizer],
    start: Position,
    ema: optim.MovingAverage | None,
) -> None:
    """Print, before the first step, where the run begins, its batches and its learning rates."""
    if start != Position():
        progress.say(f"resumed: {args.resume}, at step {start.step} of epoch {start.epoch} (both count from 0)")
    steps = sampler.num_images // sampler.global_batch  # of a whole epoch; one begun on other processes has others
    processes = distributed.world_size()
    progress.say(
        f"global batch: {processes} {'process' if processes == 1 else 'processes'} x {args.batch_size} = "
        f"{sampler.global_batch} images; {steps} steps an epoch, {args.epochs} epochs in all"
    )
    rates = ", ".join(f"{name} {optimizer.param_groups[0]['lr']:g}" for name, optimizer in optimizers.items())
    progress.say(
        f"learning rates of epoch {start.epoch}: {rates}; --opt {args.opt}, --lr-scheduler {args.lr_scheduler}"
    )
    if ema is not None:
        set_memory, last_memory, all_steps = ema.memory(steps, args.epochs)
        if set_memory > all_steps:
            progress.say(
                f"--model-ema: at this decay the average would reach back {set_memory:,.0f} steps, and the run has "
                f"{all_steps:,}; its warm-up makes it {last_memory:,.0f} at the end. A smaller --model-ema-decay or "
                "--model-ema-steps shortens it."
            )


def say_done(args: argparse.Namespace, saver: Saver) -> None:
    """At the end of a run."""
    of_average = " (of the moving average)" if args.model_ema else ""
    best = f"best macro F1 on val {saver.best_f1:.4f}{of_average}"
    progress.say(f"{args.epochs} epochs are done; {best}; the files are in {saver.output_dir.resolve()}")


def normalize(args: argparse.Namespace, device: torch.device) -> Normalize:
    return Normalize(args.mean, args.std, memory_format(args, device)).to(device)


def memory_format(args: argparse.Namespace, device: torch.device) -> torch.memory_format:
    """Of --channels-last. Not of itself on the CPU, where torch 2.14.1 crashes on timm's fastvit_t8."""
    channels_last = device.type == "cuda" if args.channels_last is None else args.channels_last
    return torch.channels_last if channels_last else torch.contiguous_format


def autocast_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """What --amp computes in; None without it."""
    if not args.amp:
        return None
    return torch.bfloat16 if args.amp_dtype == "bf16" else torch.float16


def uses_fp16(args: argparse.Namespace) -> bool:
    """True if gradients must be scaled."""
    return args.amp and args.amp_dtype == "fp16"


def seed_everything(args: argparse.Namespace) -> None:
    """Seed all ranks alike, for equal initial weights; choose algorithms that repeat bit for bit if asked."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not args.use_deterministic_algorithms
    if args.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS first starts
    torch.use_deterministic_algorithms(args.use_deterministic_algorithms)
