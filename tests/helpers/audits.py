"""Small data sets for the tests of the audit."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from utils.audit import __main__ as audit
from utils.audit.images import RECORD
from utils.audit.rule import REASONS, Census, take_census
from utils.data.folders import ImageFiles

LEAK, CONTRADICTS, REPEATS = REASONS[3:]


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A grey image of smooth spots, different for each seed."""
    spots = np.random.default_rng(seed).integers(30, 220, (7, 7), dtype=np.uint8)
    return Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)


def put(path: Path, image: Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def run(data: Path, folder: Path, *flags: str) -> str:
    """Audit data without workers: reports in folder/out, the list in folder/list. Returns the report's text."""
    outputs = ["-o", str(folder / "out"), "--exclude-list", str(folder / "list")]
    audit.main([str(data), *outputs, "-j", "0", *flags])
    return (folder / "out" / "report.txt").read_text()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def census_of(root: Path, images: dict[str, tuple[int, int]], correlation: float | None = 0.984) -> Census:
    """Census of images named <split>/<class>/<image>, each with a pixel digest and a place on a line.

    Images at a distance of d correlate by 1 - d / 200.
    """
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    files = [ImageFiles.find(root / split) for split in ("train", "val", "test") if (root / split).is_dir()]
    names = [f"{split.root.name}/{split.path_as_text(index)}" for split in files for index in range(len(split))]
    records = np.zeros(len(names), RECORD)
    records["width"] = records["height"] = 10
    records["square"] = 100
    records["pixels"][:, 0] = [images[name][0] for name in names]
    places = np.array([images[name][1] for name in names])
    records["descriptor"] = np.where(np.arange(400) < places[:, None], 1, -1)
    return take_census(files, records, [""] * len(names), 2.0, correlation)


def left_out(census: Census) -> dict[str, str]:
    """The reason of each image that is left out, by name."""
    return {census.name(index): REASONS[census.reason[index]] for index in np.flatnonzero(census.reason)}
