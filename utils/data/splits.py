"""The splits of a run from its flags: folders, transforms, caches and loaders."""

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from utils.choices import SPLITS
from utils.data.cache_build import BATCH, CacheBuild, build_together
from utils.data.dataset import ImageFolder, build_loader
from utils.data.device_crops import FILTERS, DeviceImages
from utils.data.folders import LAYOUT, ImageFiles, check_same_classes, find_classes, read_excluded
from utils.data.samplers import EvaluationSampler, TrainingSampler
from utils.data.transforms import DrawCrop, evaluation_transform, training_transform
from utils.phantoms import dataset as phantoms
from utils.runtime import distributed, progress
from utils.runtime.distributed import agreed
from utils.runtime.errors import UserError
from utils.runtime.launch import current_launch
from utils.runtime.node_limits import shared_memory_problem
from utils.runtime.text import explain_forms, list_names

# What the pixels of a cache depend on, besides the image files.
CACHE_PARAMETERS = ("val_resize_size", "interpolation", "backend", "gray", "upper_8_bits")


class Splits(NamedTuple):
    """The opened splits; `training` is None with --test-only."""

    training: ImageFolder | None
    evaluation: ImageFolder
    classes: list[str]


def open_splits(args: argparse.Namespace, trained_classes: list[str] | None = None, source: str = "") -> Splits:
    """Open, check and describe the splits that the run needs; without --data-path the generated phantoms.

    trained_classes: with --test-only, the classes of the training as the weight file `source` names them. None: those
    of the train folder, or if there is none, of the evaluated split. The evaluated split may lack some of them.

    Raises UserError for missing folders, a single class, different classes in the splits, a --num-classes that does not
    match the data, and an --exclude that matches no image or empties a class.
    """
    check_cache_flags(args)
    root = _data_root(args.data_path)
    evaluated = args.split if args.test_only else "val"
    excluded = read_excluded(Path(args.exclude)) if args.exclude else dict.fromkeys(SPLITS, frozenset())
    classes, counted_in, trained_on = None, root, "'train'"
    if args.test_only and trained_classes is not None:
        classes, counted_in = trained_classes, source
        trained_on = f"{source}, which was trained on classes of other names"
    elif args.test_only and evaluated != "train":
        with suppress(UserError):  # without a train folder, the classes of the split itself
            classes = find_classes(root / "train")
    files = ImageFiles.find(root / evaluated, excluded[evaluated], classes, trained_on)
    evaluation = _image_folder(args, files, transform_for_evaluation(args), "blank")
    training = None
    if not args.test_only:
        files = ImageFiles.find(root / "train", excluded["train"])
        training = _image_folder(args, files, _training_transform(args), "replace")
        check_same_classes(root, {"train": training.classes, "val": evaluation.classes})
    opened = [split.files for split in (training, evaluation) if split is not None]
    if len(evaluation.classes) == 1:
        raise UserError(
            f"{opened[0].root}: its only class folder is {list_names(evaluation.classes)}, and a classifier needs two "
            f"classes or more; expected {LAYOUT}."
        )
    if training is not None and (root / "test").is_dir():  # now, not after the training
        opened.append(ImageFiles.find(root / "test", excluded["test"], training.classes))
    for files in opened:
        print_split(files)
    if args.exclude:
        trained_or_evaluated = [split.files for split in (training, evaluation) if split is not None]
        print_excluded(args.exclude, excluded, trained_or_evaluated)
    num_classes = len(evaluation.classes)
    if args.num_classes is not None and args.num_classes != num_classes:
        raise UserError(
            f"--num-classes {args.num_classes}: {counted_in} has {num_classes} classes; correct or leave out the flag."
        )
    return Splits(training, evaluation, evaluation.classes)


def _image_folder(
    args: argparse.Namespace, files: ImageFiles, transform: nn.Module, replacement: Literal["replace", "blank"]
) -> ImageFolder:
    """A split; replacement: of unreadable images with `--bad-images skip`."""
    return ImageFolder(
        files.root,
        transform,
        args.seed,
        on_bad_image=replacement if args.bad_images == "skip" else "error",
        max_bad_images=args.max_bad_images,
        gray=args.gray,
        upper_8_bits=args.upper_8_bits,
        files=files,
    )


def print_split(files: ImageFiles) -> None:
    """Print a split's images and classes, the ignored files, and the classes of the training that it lacks."""
    progress.say(files.describe())
    if ignored := files.describe_ignored():
        progress.say(f"warning: {ignored}")
    if empty := files.empty_classes():
        progress.say(
            f"{files.root.name}: no images of {list_names(empty)} ({len(empty)} of the training's {len(files.classes)} "
            "classes); macro metrics are over the other classes."
        )


def print_excluded(path: str, excluded: dict[str, set[str]], opened: list[ImageFiles]) -> None:
    """Print how many images are excluded and how many lines match no image; raises UserError if no line matches.

    Lines for splits that this run does not open are ignored.
    """
    counts = {files.root.name: files.excluded for files in opened}
    absent = sum(len(excluded[name]) for name in ("", *counts)) - sum(counts.values())
    if absent and absent == sum(map(len, excluded.values())):
        raise UserError(f"--exclude {path}: names no image of the data; expected lines such as train/<class>/<image>.")
    left_out = ", ".join(f"{count} of {name}" for name, count in counts.items())
    progress.say(f"--exclude {path}: leaves out {left_out}; lines that name no image: {absent}.")


def check_same_data(splits: Splits, state: dict[str, Any] | None, source: str) -> None:
    """Raise UserError if a resumed run would continue on other data than it started with."""
    if state is None:
        return
    restart = "start a new run from its weights with _normal/train.py --finetune."
    if state["classes"] != splits.classes:
        raise UserError(
            f"{source}: the run started with other classes than the data has now; "
            f"{restart}{explain_forms(splits.classes, state['classes'])}"
        )
    if state["train_images"] != len(splits.training):
        raise UserError(
            f"{source}: the run started with {state['train_images']} images in {splits.training.root}, which has "
            f"{len(splits.training)} now; restore them, or {restart}"
        )
    recorded = state.get("image_files", {})  # older checkpoints have none
    present = digests(splits) if recorded else {}
    differing = [name for name, digest in recorded.items() if present[name] != digest]
    if differing:
        raise UserError(
            f"{source}: the run started with other images in {differing[0]} than the data has now, judging by their "
            f"names and --exclude; restore them, or {restart}"
        )


def digests(splits: Splits) -> dict[str, str]:
    """Digests of the names of the training and validation images, for the checkpoint."""
    return {"train": splits.training.files.digest(), "val": splits.evaluation.files.digest()}


def _data_root(data_path: str | None) -> Path:
    if data_path is None:
        try:
            root = phantoms.ensure_default()
        except OSError as error:
            raise UserError(f"The phantoms cannot be written ({error}); give --data-path.") from None
        progress.say(f"No --data-path was given: using generated phantoms in {root}, which are not real images.")
        return root
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder; expected {LAYOUT}.")
    return root


def transform_for_evaluation(args: argparse.Namespace, crop: bool = True) -> nn.Module:
    """crop: False for the resize alone, as in a cache."""
    return evaluation_transform(
        args.val_resize_size,
        args.val_crop_size if crop else None,
        interpolation=args.interpolation,
        backend=args.backend,
        gray=args.gray,
    )


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
        gray=args.gray,
    )


def training_batch(args: argparse.Namespace) -> int:
    """The images of one update on each process: a loader's batch, which passes through the networks in parts."""
    return args.batch_size * args.grad_accum_steps


def training_loader(args: argparse.Namespace, dataset: ImageFolder, device: torch.device) -> DataLoader:
    """The loader of training batches. Raises UserError for less than one global batch, or too little shared memory."""
    sampler = TrainingSampler(
        len(dataset),
        training_batch(args),
        distributed.rank(),
        distributed.world_size(),
        args.seed,
        args.ra_reps if args.ra_sampler else 1,
    )
    pin_memory = device.type == "cuda" and args.cache_dataset != "device"  # there a batch is only crop coordinates
    if args.cache_dataset != "device":
        _check_shared_memory(args, training_batch(args), args.train_crop_size, len(sampler))
    return build_loader(dataset, sampler, args.workers, pin_memory)


def evaluation_loader(args: argparse.Namespace, dataset: ImageFolder, device: torch.device) -> DataLoader:
    """The loader of evaluation batches. Raises UserError, on all ranks, for too little shared memory."""
    sampler = EvaluationSampler(len(dataset), args.batch_size, distributed.rank(), distributed.world_size())
    with agreed():
        _check_shared_memory(args, args.batch_size, args.val_crop_size, len(sampler))
    return build_loader(dataset, sampler, args.workers, pin_memory=device.type == "cuda")


def one_batch_loaders(args: argparse.Namespace, splits: Splits) -> tuple[DataLoader, DataLoader]:
    """Loaders of one training and one evaluation batch per rank, read without workers; for the rehearsal."""
    rank, world_size, batch_size = distributed.rank(), distributed.world_size(), training_batch(args)
    training = TrainingSampler(batch_size * world_size, batch_size, rank, world_size, args.seed)
    evaluation = EvaluationSampler(len(splits.evaluation), args.batch_size, rank, world_size, spread=True)
    return (
        build_loader(splits.training, training, workers=0, pin_memory=False),
        build_loader(splits.evaluation, evaluation, workers=0, pin_memory=False),
    )


def _check_shared_memory(args: argparse.Namespace, batch_size: int, size: int, batches: int) -> None:
    batch_bytes = batch_size * _channels(args) * size**2
    problem = shared_memory_problem(batch_bytes, batches, args.workers, current_launch().local_world_size)
    if problem is not None:
        raise UserError(problem)


def _channels(args: argparse.Namespace) -> int:
    return 1 if args.gray else 3


def check_cache_flags(args: argparse.Namespace) -> None:
    """Raise UserError for a missing cache folder, one among the images, and flags that exclude a device cache."""
    if args.cache_dataset == "off":
        if args.cache_dir is not None:
            progress.say("--cache-dir: without effect, since --cache-dataset is off.")
        return
    if args.cache_dir is None:
        raise UserError(
            f"--cache-dataset {args.cache_dataset}: give --cache-dir a folder, on a local disk of this node with "
            "space for all images; later runs reuse it."
        )
    cache_dir, root = Path(args.cache_dir).resolve(), Path(args.data_path or os.devnull)
    if any(cache_dir.is_relative_to((root / split).resolve()) for split in SPLITS):
        raise UserError(f"--cache-dir {args.cache_dir}: lies among the images of --data-path; give another folder.")
    if args.cache_dataset == "device" and not args.test_only:
        if args.auto_augment is not None or args.random_erase > 0:
            name = "--auto-augment" if args.auto_augment is not None else "--random-erase"
            raise UserError(f"--cache-dataset device: does not support {name}; give --cache-dataset host.")
        if args.interpolation not in FILTERS:
            raise UserError(
                f"--cache-dataset device: does not support --interpolation {args.interpolation}; give --cache-dataset "
                f"host, or one of {', '.join(FILTERS)}."
            )
        if args.interpolation == "bicubic" and args.backend == "pil":
            raise UserError(
                "--cache-dataset device: does not support --interpolation bicubic with --backend pil, whose "
                "rounding differs between crops and between versions of Pillow; give --backend tensor, --interpolation "
                "bilinear or --cache-dataset host."
            )


def use_cache(args: argparse.Namespace, splits: Splits, device: torch.device) -> None:
    """With --cache-dataset, make the splits read from their caches; all ranks together build missing caches.

    With `device` the training images are on the device, and evaluation reads as with `host`. Raises UserError for an
    unreadable image, unless they are skipped, for a folder that cannot be written, and for too little memory.
    """
    if args.cache_dataset == "off":
        return
    with agreed():
        datasets = [split for split in (splits.training, splits.evaluation) if split is not None]
        builds = [_cache_build(args, dataset) for dataset in datasets]
        for build in builds:
            batch_bytes = BATCH * _channels(args) * args.val_resize_size**2  # more if images are not square
            batches = 0 if build.is_complete() else len(build.files) // BATCH
            problem = shared_memory_problem(batch_bytes, batches, build.workers, processes=1)
            if problem is not None and batches:
                raise UserError(f"{build.folder}, to be built: {problem}")
    build_together(builds)
    with agreed():
        for dataset, build in zip(datasets, builds, strict=True):
            if dataset is splits.training and args.cache_dataset == "device":
                dataset.cache, dataset.transform = build.open("size"), DrawCrop(args.train_crop_size)
                compiled = args.compile and device.type == "cuda"
                dataset.on_device = DeviceImages(
                    dataset.cache, args.train_crop_size, args.interpolation, device, compiled
                )
            else:
                dataset.cache = build.open(args.backend)


def _cache_build(args: argparse.Namespace, dataset: ImageFolder) -> CacheBuild:
    return CacheBuild(
        Path(args.cache_dir),
        dataset.files,
        transform_for_evaluation(args, crop=False),
        gray=args.gray,
        parameters={name: getattr(args, name) for name in CACHE_PARAMETERS},
        max_bad_images=args.max_bad_images if args.bad_images == "skip" else None,
        workers=min(args.workers * current_launch().local_world_size, os.cpu_count() or 1),
        upper_8_bits=args.upper_8_bits,
        timeout=args.timeout,
    )
