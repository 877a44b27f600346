"""Grey PNG files to measure loading with; links repeat them as often as needed."""

import itertools
import os
from pathlib import Path

from PIL import Image

from benchmarks.setting import Setting
from utils.data.folders import find_classes
from utils.data.listing import PassedOver, find_images, is_hidden
from utils.phantoms import dataset as phantoms

CLASSES = 4


def png_files(setting: Setting, count: int) -> list[Path]:
    """At most `count` different grey PNGs with a shorter side of 8/7 of a crop; made once.

    Sources: the images of --data whose shorter side is at least a crop's, or generated images.
    """
    folder = setting.work / "png"
    if not folder.exists():
        folder.mkdir()
        sources = _real_images(setting, count) if setting.data else _generated_images(setting, count)
        for number, source in enumerate(sources):
            _save_grey(source, folder / f"{number:05d}.png", setting.size * 8 // 7)
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))[:count]


def _real_images(setting: Setting, count: int) -> list[Path]:
    """Images of the training split that are large enough, taken from its classes in turn."""
    root = setting.data / "train"
    by_class = [map(Path, find_images(root / name, PassedOver())) for name in find_classes(root)]
    in_turns = (path for paths in itertools.zip_longest(*by_class) for path in paths if path)
    large_enough = (path for path in in_turns if _shorter_side(path) >= setting.size)
    images = list(itertools.islice(large_enough, count))
    if not images:
        raise ValueError(f"{root}: holds no image with a shorter side of {setting.size} pixels or more")
    return images


def _shorter_side(path: Path) -> int:
    with Image.open(path) as image:  # reads the header only
        return min(image.size)


def _generated_images(setting: Setting, count: int) -> list[Path]:
    """Phantoms, whose training split has 1500 images at scale 1."""
    root = setting.work / "phantoms-of-png-size"
    phantoms.generate(root, size=setting.size * 8 // 7, scale=max(0.02, count / 1500))
    return sorted((root / "train").rglob("*.png"))[:count]


def _save_grey(source: Path, target: Path, shorter_side: int) -> None:
    with Image.open(source) as image:
        grey = image.convert("L")
    scale = shorter_side / min(grey.size)
    grey.resize([round(side * scale) for side in grey.size], Image.Resampling.BILINEAR).save(target)


def image_folder(setting: Setting, name: str, train: int, val: int, different: int = 400) -> Path:
    """DATA/{train,val}/<class>/<number>.png: links to at most `different` PNGs in turn.

    After the first pass the files are in the page cache in any case; decoding, which is measured, happens every time.
    """
    root = setting.work / name
    if root.exists():
        return root
    files = png_files(setting, different)
    for split, count in (("train", train), ("val", val)):
        folders = [root / split / f"class-{number}" for number in range(CLASSES)]
        for folder in folders:
            folder.mkdir(parents=True)
        for number, source in zip(range(count), itertools.cycle(files), strict=False):
            os.symlink(source, folders[number % CLASSES] / f"{number:07d}.png")
    return root
