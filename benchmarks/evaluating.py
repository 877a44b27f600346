"""Row 9: evaluation of image files against bare forward passes over images on the device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from _normal import train as normal
from benchmarks.images import image_folder
from benchmarks.loading import cache_flags
from benchmarks.ours import Watched, build, first_batch
from benchmarks.report import Measurement, Target, measured
from benchmarks.setting import Setting
from benchmarks.timing import compare, rates, synchronizer


@torch.no_grad()
def forward_passes(model: nn.Module, images: Tensor, count: int, autocast: Callable[[], torch.autocast]) -> None:
    """The minimum work of evaluating `count` batches."""
    model.eval()
    for _ in range(count):
        with autocast():
            model(images)


def evaluation(setting: Setting) -> list[Measurement]:
    """Row 9: evaluation of image files, including decoding, over bare forward passes.

    On the CPU one worker decodes while the arithmetic uses all cores, so decoding time is lost; measured with resnet50,
    the default model. On a GPU 16 workers read from the cache.
    """
    if setting.on_gpu:
        count, batch_size, workers, flags = 24576, 256, 16, ["--amp", *cache_flags(setting, "host")]
    else:
        count, batch_size, workers, flags = 64, None, 1, []
    if setting.quick:
        count, batch_size = 16, None
    data = image_folder(setting, "evaluation", train=batch_size or setting.batch_size, val=count)
    command = [*setting.flags("resnet50", batch_size, workers), *flags]
    loop = build(normal, data, setting.new_folder("run"), *command)
    loader = loop.predict.keywords["loader"]
    images = loop.run.normalize(first_batch(loader, setting.device).images)  # (B, 3, S, S)
    skip = 1 if len(loader) < 50 else 10
    watched = Watched(loader, skip, synchronizer(setting.device))
    sides = {
        "ours": lambda: watched.seconds_of(lambda: loop.evaluate(watched)),
        "theirs": lambda: forward_passes(loop.classifier, images, len(loader), loop.training.settings.autocast),
    }
    seconds = setting.time(sides)
    comparison = compare(
        rates(seconds["ours"], count - skip * len(images)), rates(seconds["theirs"], len(images) * len(loader))
    )
    precision = "--amp --gray --cache-dataset host" if flags else "float32"
    what = f"evaluation over bare forward passes, {setting.model('resnet50')} {precision}, B={len(images)}"
    note = (
        f"{count} PNG files, {workers} workers, the first {skip} steps not counted; theirs: one normalised batch on "
        "the device, repeated"
    )
    return [measured(9, what, "images/s", comparison, Target(True, 0.95 if setting.on_gpu else 0.98), note)]
