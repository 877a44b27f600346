"""Parts of a data set, as folders of links that the scripts read like any other: some classes, few images of each."""

import fnmatch
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

from experiments.plan import Subset
from utils.data.folders import SPLITS, ImageFiles, find_classes, read_excluded
from utils.runtime.errors import UserError


def matches(name: str, patterns: str) -> bool:
    """Does a class fit one of the shell patterns, which commas separate?"""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split(",") if pattern)


def choose(names: Iterable[str], shots: int, draw: int) -> list[str]:
    """`shots` of the names, or all where there are fewer; of one draw, more shots hold fewer ones."""
    shuffled = sorted(names)
    random.Random(draw).shuffle(shuffled)
    return sorted(shuffled[:shots])


def link_subset(data: Path, subset: Subset, folder: Path, exclude: Path | None = None) -> None:
    """Make `folder` the subset of DATA/{train,val,test}/<class>/<image>, of relative links.

    A folder with other links, of other data or another list, or that was copied away from its data, is made anew.
    exclude: a list as `--exclude` takes it; what it names is not linked. Raises UserError for patterns that fit no
    class.
    """
    images = _choose_images(data, subset, exclude)
    # Relative, so that the set may be moved together with them.
    links = {image: os.path.relpath(data / image, _real_parent(folder / image)) for image in images}
    if _read_links(folder) == links:
        return
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for image, target in links.items():
        link = unfinished / image
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    if folder.is_dir():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def _choose_images(data: Path, subset: Subset, exclude: Path | None) -> list[str]:
    """Relative to DATA."""
    excluded = read_excluded(exclude) if exclude else {}
    images = []
    for split in SPLITS:
        classes = find_classes(data / split) if split == "test" else None  # of test some may be empty
        files = ImageFiles.find(data / split, frozenset(excluded.get(split, ())), classes)
        names: dict[str, list[str]] = {}
        for index, target in enumerate(files.targets.tolist()):
            names.setdefault(files.classes[target], []).append(files.path_as_text(index))
        chosen = [name for name in names if matches(name, subset.classes) and not matches(name, subset.without)]
        if not chosen:
            raise UserError(f"{data / split}: has no class like {subset.classes} but not {subset.without or 'any'}.")
        few = split == "train" and subset.shots is not None
        for name in chosen:
            of_class = choose(names[name], subset.shots, subset.draw) if few else names[name]
            images += [f"{split}/{image}" for image in of_class]
    return images


def _read_links(folder: Path) -> dict[str, str]:
    """Where the links below a folder lead, by their path in it; none where there is no such folder."""
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder): os.readlink(path) for path in paths if os.path.islink(path)}


def _real_parent(link: Path) -> Path:
    """Where `..` in a relative link starts from."""
    return Path(os.path.realpath(link.parent))
