"""From the command line's values to the objects that both scripts share; the namespace goes no further than here."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from utils import distributed, models, optim, phantoms, progress, rehearsal
from utils.bad_images import BadImages
from utils.checkpoint import Weights
from utils.data import (
    LAYOUT,
    EvaluationSampler,
    ImageFolder,
    TrainingSampler,
    build_loader,
    check_same_classes,
    find_classes,
)
from utils.errors import UserError
from utils.progress import Position
from utils.saving import Saver
from utils.state import TrainingState
from utils.transforms import BatchMixing, evaluation_transform, training_transform


class Splits(NamedTuple):
    """`training` is None with --test-only."""

    training: ImageFolder | None
    evaluation: ImageFolder
    classes: list[str]


def open_splits(args: argparse.Namespace) -> Splits:
    """The splits that the run needs, checked; the generated phantoms without --data-path.

    Raises UserError for missing folders, classes that differ between the splits, and --num-classes unlike the data.
    """
    root = _data_root(args.data_path)
    evaluated = args.split if args.test_only else "val"
    evaluation = ImageFolder(
        root / evaluated,
        evaluation_transform(
            args.val_resize_size, args.val_crop_size, interpolation=args.interpolation, backend=args.backend
        ),
        on_bad_image="blank" if args.bad_images == "skip" else "error",
    )
    training = None
    if not args.test_only:
        training = ImageFolder(
            root / "train",
            _training_transform(args),
            args.seed,
            on_bad_image="next" if args.bad_images == "skip" else "error",
            max_bad_images=args.max_bad_images,
        )
        splits = {"train": training.classes, "val": evaluation.classes}
        if (root / "test").is_dir():
            splits["test"] = find_classes(root / "test")
        check_same_classes(root, splits)
    found = len(evaluation.classes)
    if args.num_classes is not None and args.num_classes != found:
        raise UserError(f"--num-classes {args.num_classes}: {root} has {found} classes; correct or leave out the flag.")
    return Splits(training, evaluation, evaluation.classes)


def check_same_data(splits: Splits, state: dict[str, Any] | None, source: str) -> None:
    """Raise UserError if a run is to go on with other data than it began with."""
    if state is None:
        return
    if state["classes"] != splits.classes:
        raise UserError(
            f"{source}: the run began with other classes than the data has now; start a new run from its weights with "
            "_normal/train.py --finetune."
        )
    if state["train_images"] != len(splits.training):
        raise UserError(
            f"{source}: the run began with {state['train_images']} images in {splits.training.root}, which has "
            f"{len(splits.training)} now; restore them, or start a new run from its weights with _normal/train.py "
            "--finetune."
        )


def _data_root(data_path: str | None) -> Path:
    if data_path is None:
        try:
            root = phantoms.ensure_default()
        except OSError as error:
            raise UserError(f"The phantoms cannot be written ({error}); give --data-path.") from None
        progress.say(f"No --data-path was given: using generated phantoms in {root}, which are no real images.")
        return root
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder; expected {LAYOUT}.")
    return root


def _training_transform(args: argparse.Namespace) -> nn.Module:
    return training_transform(
        args.train_crop_size,
        args.mean,
        interpolation=args.interpolation,
        auto_augment=args.auto_augment,
        ra_magnitude=args.ra_magnitude,
        augmix_severity=args.augmix_severity,
        random_erase=args.random_erase,
        backend=args.backend,
    )


def training_loader(args: argparse.Namespace, dataset: ImageFolder, device: torch.device) -> DataLoader:
    """Raises UserError if there are fewer images than one global batch."""
    sampler = TrainingSampler(
        len(dataset),
        args.batch_size,
        distributed.rank(),
        distributed.world_size(),
        args.seed,
        args.ra_reps if args.ra_sampler else 1,
    )
    return build_loader(dataset, sampler, args.workers, pin_memory=device.type == "cuda")


def evaluation_loader(args: argparse.Namespace, dataset: ImageFolder, device: torch.device) -> DataLoader:
    sampler = EvaluationSampler(len(dataset), args.batch_size, distributed.rank(), distributed.world_size())
    return build_loader(dataset, sampler, args.workers, pin_memory=device.type == "cuda")


def bad_images(args: argparse.Namespace) -> BadImages:
    """What the loops and the evaluation tell of images that cannot be read; one for the whole run."""
    return BadImages(args.max_bad_images if args.bad_images == "skip" else None)


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
        load_weights(model, weights, classes, args.test_only)
    if args.sync_bn and device.type == "cpu":
        progress.say("--sync-bn: torch has no SyncBatchNorm for the CPU; the statistics stay those of each process.")
    if args.sync_bn:
        model = models.synchronize_batch_norm(model, device)
    return model.to(device)


def load_weights(model: nn.Module, weights: Weights, classes: list[str], test_only: bool) -> None:
    """Load a file's weights; on other classes the head is renewed, and it is said so (an error with --test-only)."""
    rows = models.head_size(model, weights.model)
    if rows is not None and rows != len(classes):
        difference = f"{rows} classes instead of {len(classes)}"
    elif weights.classes is not None and weights.classes != classes:
        difference = f"classes of other names ({', '.join(sorted(set(weights.classes) ^ set(classes))[:4])}, ...)"
    else:
        models.load_classifier(model, weights.model, weights.path)
        if weights.classes is None:
            progress.say(f"{weights.path} names no classes; they are taken to be the data's, in the same order.")
        return
    if test_only:
        raise UserError(f"{weights.path}: was trained on {difference}; --test-only needs the classes of the data.")
    models.load_classifier(model, weights.model, weights.path, renew_head=True)
    progress.say(f"{weights.path} was trained on {difference}: the head is new, the body keeps its weights.")


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
            "args": vars(args),
        },
        start=Position.of(state),
        best_f1=state["best_f1"] if state else -1.0,
        checkpoint_steps=args.checkpoint_steps,
    )


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
    )


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
