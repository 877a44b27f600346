"""Parts of a data set, as folders of links that the scripts read like any other: some classes, few images of each."""

import fnmatch
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

from experiments.plan import Subset
from utils.errors import UserError
from utils.folders import SPLITS, ImageFiles, read_excluded


def matches(name: str, patterns: str) -> bool:
    """Does a class fit one of the shell patterns, which commas separate?"""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split(",") if pattern)


def choose(names: Iterable[str], shots: int, draw: int) -> list[str]:
    """`shots` of the names, or all where there are fewer; of one draw, more shots hold fewer ones."""
    shuffled = sorted(names)
    random.Random(draw).shuffle(shuffled)
    return sorted(shuffled[:shots])


def link_subset(data: Path, subset: Subset, folder: Path, exclude: Path | None = None) -> None:
    """Make `folder` the subset of DATA/{train,val,test}/<class>/<image>: relative links; a folder there stays.

    exclude: a list as `--exclude` takes it; what it names is not linked. Raises UserError for patterns that fit no
    class.
    """
    if folder.is_dir():
        return
    excluded = read_excluded(exclude) if exclude else {}
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split in SPLITS:
        files = ImageFiles.find(data / split, frozenset(excluded.get(split, ())))
        names: dict[str, list[str]] = {}
        for index, target in enumerate(files.targets.tolist()):
            names.setdefault(files.classes[target], []).append(files.path_as_text(index))
        chosen = [name for name in names if matches(name, subset.classes) and not matches(name, subset.without)]
        if not chosen:
            raise UserError(f"{data / split}: has no class like {subset.classes} but not {subset.without or 'any'}.")
        for name in chosen:
            few = split == "train" and subset.shots is not None
            for image in choose(names[name], subset.shots, subset.draw) if few else names[name]:
                link = unfinished / split / image
                link.parent.mkdir(parents=True, exist_ok=True)
                # Relative, so that the set may be moved together with them.
                link.symlink_to(os.path.relpath(data / split / image, _real_parent(link)))
    unfinished.rename(folder)


def _real_parent(link: Path) -> Path:
    """Where `..` in a relative link starts from."""
    return Path(os.path.realpath(link.parent))
