"""Tables of made-up images, and folders prepared from them."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_image
from utils.prepare.__main__ import main
from utils.runtime.errors import UserError

HEAD = ("file", "label", "patient", "fold")


def write_table(path: Path, rows: Iterable[Sequence[object]], head: Sequence[str] = HEAD, separator: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, delimiter=separator).writerows([head, *rows])
    return path


def write_source(root: Path, patients: int = 20) -> Path:
    """A table of 3 images for each patient of 2 classes, images/<patient>/<number>.png; returns the table."""
    rows = []
    for patient in range(patients):
        for number in range(3):
            name = f"images/p{patient}/{number}.png"
            write_image(root / name, np.random.default_rng([patient, number]).integers(0, 256, (9, 8)))
            split = ("train", "Training", "valid", "test")[patient // 2 % 4]
            rows.append((name, "ab"[patient % 2], f"p{patient}", split))
    return write_table(root / "table.csv", rows)


def prepare(*words: object) -> None:
    main(list(map(str, words)))


def fails(*words: object) -> str:
    """The one-sentence error of a command that fails."""
    with pytest.raises(UserError) as caught:
        prepare(*words)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def placed(data: Path) -> dict[str, bytes]:
    """The images in class folders by <split>/<class>/<name>."""
    return {
        str(path.relative_to(data)): path.read_bytes()
        for split in ("train", "val", "test")
        for path in (data / split).rglob("*")
        if path.is_file()
    }
