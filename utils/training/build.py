"""Objects from flags. In `utils` only this module, `run` and `data/splits` take the argparse namespace."""

import argparse
import os
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.checkpoints.checkpoint import Weights
from utils.data.dataset import BadImages
from utils.data.loaders import Wait, batch_seconds
from utils.data.splits import Splits, training_batch
from utils.data.transforms import BatchMixing, Normalize
from utils.runtime import distributed, progress
from utils.runtime.signals import wait_for
from utils.training import loss, models, optim, weight_loading


def seed_everything(args: argparse.Namespace) -> None:
    """Seed all ranks alike, so that initial weights are equal; choose deterministic algorithms if asked to."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not args.use_deterministic_algorithms
    if args.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS first starts
    torch.use_deterministic_algorithms(args.use_deterministic_algorithms)


def bad_images(args: argparse.Namespace) -> BadImages:
    """Collects the unreadable images of training and evaluation; shared by the whole run."""
    return BadImages(args.max_bad_images if args.bad_images == "skip" else None)


def wait(args: argparse.Namespace) -> Wait:
    """The time limit on each batch of an evaluation on its own; during training the saver sets it."""
    return partial(wait_for, seconds=batch_seconds(args.timeout))


def normalize(args: argparse.Namespace, device: torch.device) -> Normalize:
    return Normalize(args.mean, args.std, memory_format(args, device)).to(device)


def batch_mixing(args: argparse.Namespace, num_classes: int) -> BatchMixing:
    return BatchMixing(args.mixup_alpha, args.cutmix_alpha, num_classes, args.seed, distributed.rank())


def class_weights(args: argparse.Namespace, splits: Splits, device: torch.device) -> Tensor | None:
    """The weights of --class-weights, (C,) on the device; None without the flag."""
    counts = np.bincount(splits.training.targets, minlength=len(splits.classes)).tolist()
    weights = loss.class_weights(args.class_weights, counts)
    return None if weights is None else weights.to(device)


def memory_format(args: argparse.Namespace, device: torch.device) -> torch.memory_format:
    """The memory format of --channels-last. Not the CPU's default: there torch 2.14.1 crashes on timm's fastvit_t8."""
    channels_last = device.type == "cuda" if args.channels_last is None else args.channels_last
    return torch.channels_last if channels_last else torch.contiguous_format


def autocast_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The lower precision of --amp; None without --amp."""
    if not args.amp:
        return None
    return torch.bfloat16 if args.amp_dtype == "bf16" else torch.float16


def uses_fp16(args: argparse.Namespace) -> bool:
    """Whether gradients must be scaled."""
    return args.amp and args.amp_dtype == "fp16"


def classifier(
    args: argparse.Namespace,
    classes: list[str],
    state: dict[str, Any] | None,
    weights: Weights | None,
    device: torch.device,
) -> nn.Module:
    """The classifier on its device, with weights from the checkpoint, the weight file, timm's tag, or random ones.

    For other classes than those of the weight file the head is reinitialised and a message is printed (an error with
    --test-only). Raises UserError for weights that do not fit.
    """
    starts_from_file = state is not None or weights is not None
    tag = None if starts_from_file else args.weights
    # Models with a fixed input size are built for the training crops, with --test-only too.
    rates = {"drop_rate": args.drop_rate, "drop_path_rate": args.drop_path}
    rates = {name: rate for name, rate in rates.items() if rate is not None}
    model = models.create_classifier(args.model, len(classes), args.train_crop_size, tag, rates=rates)
    if args.val_crop_size != args.train_crop_size:
        models.output_width(model, args.val_crop_size)
    if state is not None:
        models.load_classifier(model, state["model"], args.resume)
    elif weights is not None:
        weight_loading.load_weights(model, weights, classes, args.test_only, progress.say)
    if args.sync_bn and device.type == "cpu":
        progress.say("--sync-bn: torch has no SyncBatchNorm for the CPU; each process keeps its own statistics.")
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


def scheduler(args: argparse.Namespace, optimizer: Optimizer, first_epoch: int) -> LRScheduler:
    """The classifier's schedule, advanced to `first_epoch`."""
    if args.lr_warmup_epochs >= args.epochs:
        progress.say(
            f"--lr-warmup-epochs {args.lr_warmup_epochs}: not below --epochs {args.epochs}: the whole run is warm-up."
        )
    return optim.build_scheduler(
        optimizer,
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
    """The moving average of --model-ema; None without the flag."""
    if not args.model_ema:
        return None
    return optim.MovingAverage(
        model,
        args.model_ema_decay,
        args.model_ema_steps,
        epochs=args.epochs,
        global_batch=training_batch(args) * distributed.world_size(),
        warmup_epochs=args.lr_warmup_epochs,
    )
