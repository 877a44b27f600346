"""Rows 5 to 7: images from files and from the cache, against torchvision's preset and against a fixed batch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from _normal import train as normal
from benchmarks.images import image_folder
from benchmarks.ours import FixedLoader, Loop, Watched, build
from benchmarks.report import Measurement, Target, measured, not_measured
from benchmarks.setting import Setting
from benchmarks.timing import compare, rates, synchronizer
from utils.data.dataset import batches

MEAN, STD = [0.3162] * 3, [0.3213] * 3
TRAINING_TARGET = Target(True, 0.95)


def preset_loader(root: Path, size: int, batch_size: int) -> DataLoader:
    """torchvision's preset for PIL images, from its classification reference: float32, normalised, RGB."""
    preset = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BILINEAR, antialias=True),
            transforms.RandomHorizontalFlip(0.5),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(datasets.ImageFolder(root, preset), batch_size, shuffle=True, drop_last=True, num_workers=0)


def drain(loader: Iterable) -> None:
    for _ in loader:
        pass


def epoch_of(loop: Loop) -> None:
    """Load one epoch with a script's own loader, up to batches on the device, without training."""
    loop.loader.batch_sampler.set_position(0)
    drain(batches(loop.loader, loop.device, loop.run.bad_images))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run all arithmetic on one core, as in a loader's worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cache_flags(setting: Setting, kind: str) -> list[object]:
    """Flags for a cache in one folder for all rows, which reuse it."""
    return ["--gray", "--cache-dataset", kind, "--cache-dir", setting.work / "cache"]


def first_epoch(setting: Setting) -> list[Measurement]:
    """Row 6: images/s of one core from PNG files, against torchvision's PIL preset."""
    target = Target(True, 1.7)
    return [
        _against_preset(setting, 6, "epoch from PNG files", ["--gray"], target),
        _against_preset(setting, 6, "epoch from PNG files", ["--gray", "--backend", "tensor"], target),
        _against_preset(setting, 6, "epoch from PNG files", [], Target(True, 1.5)),
    ]


def cached_epoch(setting: Setting) -> list[Measurement]:
    """Row 7: images/s of one core from the cache, against torchvision's PIL preset from PNG files."""
    target = Target(True, 6.5)
    flags = cache_flags(setting, "host")
    rows = [
        _against_preset(setting, 7, "cached epoch", more, target) for more in (flags, [*flags, "--backend", "tensor"])
    ]
    if setting.on_gpu or setting.quick:
        rows.append(_against_preset(setting, 7, "cached epoch", cache_flags(setting, "device"), target))
    return rows


def _against_preset(
    setting: Setting, number: int, what: str, flags: list[object], target: Target | None
) -> Measurement:
    count = 2 * setting.batch_size if setting.quick else 12 * setting.batch_size
    data = image_folder(setting, "loading", train=count, val=setting.batch_size)
    # The smallest classifier, because it is built but never run.
    loop = build(normal, data, setting.new_folder("run"), *setting.flags("test_resnet"), *flags)
    theirs = preset_loader(data / "train", setting.size, setting.batch_size)
    with one_thread():
        seconds = setting.time({"ours": lambda: epoch_of(loop), "theirs": lambda: drain(theirs)})
    comparison = compare(*(rates(seconds[name], count) for name in ("ours", "theirs")))
    shown = " ".join(str(flag) for flag in flags if flag not in ("--cache-dir", setting.work / "cache"))
    what = f"{what} against torchvision's preset, {setting.size} px, {shown or 'RGB'}"
    note = f"{count} grey PNG files, one process, one thread; ours uint8 on {setting.device.type}, theirs float32 RGB"
    return measured(number, what, "images/s", comparison, target, note)


def cached_training(setting: Setting) -> list[Measurement]:
    """Row 5: training from the cache with 16 workers, against the same step on one batch on the device."""
    if not (setting.on_gpu or setting.quick):
        what = "training from the cache over the same step on a fixed batch, 16 CPU cores and a GPU"
        return [not_measured(5, what, "images/s", TRAINING_TARGET, "needs a GPU: python -m benchmarks.run --rows 5")]
    cases = [(model, size, ["--amp", "--compile"]) for size in (256, 64) for model in ("resnet18", "resnet50")]
    if setting.quick:
        cases = [("resnet18", setting.batch_size, [])]
    return (_cached_training(setting, *case, kind) for case in cases for kind in ("host", "device"))


def _cached_training(setting: Setting, model: str, batch_size: int, precision: list[str], kind: str) -> Measurement:
    workers, skip, steps = (1, 1, 4) if setting.quick else (16, 20, 140)
    count = steps * batch_size
    data = image_folder(setting, f"training-{count}", train=count, val=batch_size)
    command = [*setting.flags(model, batch_size, workers), *precision, *cache_flags(setting, kind)]
    loop = build(normal, data, setting.new_folder("run"), *command)
    loader = loop.loader
    fixed = FixedLoader(loop, max(2, len(loader) // 4))
    watched = Watched(loader, skip, synchronizer(setting.device))
    sides = {
        "ours": lambda: watched.seconds_of(lambda: loop.train_epoch(watched)),
        "theirs": lambda: loop.train_epoch(fixed),
    }
    seconds = setting.time(sides, warmups=1, repeats=min(setting.repeats, 4))
    counted = (len(loader) - skip) * batch_size
    comparison = compare(rates(seconds["ours"], counted), rates(seconds["theirs"], fixed.images))
    what = (
        f"_normal from the cache over a fixed batch, {setting.model(model)} {' '.join(precision) or 'float32'}, "
        f"B={batch_size}, --gray --cache-dataset {kind}"
    )
    note = f"{workers} workers; {counted} images of one epoch, its first {skip} steps not counted"
    return measured(5, what, "images/s", comparison, TRAINING_TARGET, note)
