"""Subsets of a data set as folders of links: some classes, a few training images of each."""

import fcntl
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.plan import Subset, matches
from utils.choices import SPLITS
from utils.data.folders import ImageFiles, find_classes, read_excluded
from utils.runtime.errors import UserError


def choose(names: Iterable[str], shots: int, draw: int) -> list[str]:
    """`shots` of the names, or all if there are fewer. In one draw, larger numbers of shots include smaller ones."""
    shuffled = sorted(names)
    random.Random(draw).shuffle(shuffled)
    return sorted(shuffled[:shots])


def link_subset(data: Path, subset: Subset, folder: Path, exclude: Path | None = None) -> None:
    """Make `folder` a subset of DATA/{train,val,test}/<class>/<image>, made of relative links.

    A folder with other links is replaced: other data, another list, or a copy without its data. exclude: a list for
    `--exclude`; its images are not linked. Raises UserError if no class matches the patterns.
    """
    images = _choose_images(data, subset, exclude)
    # Relative, so that data and links can be moved together.
    links = {
        link: os.path.relpath(data / image, os.path.realpath((folder / link).parent)) for link, image in images.items()
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent):
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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is inside this block for the folder, such as a second run.py with the same output."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _choose_images(data: Path, subset: Subset, exclude: Path | None) -> dict[str, str]:
    """Links and the images they stand for: paths relative to the subset's folder and to DATA."""
    splits = _images_of_classes(data, subset, exclude)
    if subset.test == "rest":
        return _draw_and_rest(splits, subset)
    images = {}
    for split, classes in splits.items():
        for paths in classes.values():
            if split == "train" and subset.shots is not None:
                paths = choose(paths, subset.shots, subset.draw)
            images |= {f"{split}/{path}": f"{split}/{path}" for path in paths}
    return images


def _draw_and_rest(splits: dict[str, dict[str, list[str]]], subset: Subset) -> dict[str, str]:
    """`train` is drawn from `train` and `test` together, and `test` is what is left of them; see `_choose_images`.

    A link such as test/cat/train-1.png says in which split the image was.
    """
    images = {f"val/{path}": f"val/{path}" for paths in splits["val"].values() for path in paths}
    for name in splits["train"]:
        pool = [f"{split}/{path}" for split in ("train", "test") for path in splits[split].get(name, ())]
        drawn = set(pool if subset.shots is None else choose(pool, subset.shots, subset.draw))
        for image in pool:
            before, _, file = image.split("/", 2)
            images[f"{'train' if image in drawn else 'test'}/{name}/{before}-{file}"] = image
    return images


def _images_of_classes(data: Path, subset: Subset, exclude: Path | None) -> dict[str, dict[str, list[str]]]:
    """By split and class, paths relative to the split's folder, of the classes of the subset."""
    excluded = read_excluded(exclude) if exclude else {}
    splits = {}
    for split in SPLITS:
        classes = find_classes(data / split) if split == "test" else None  # in test, classes may be empty
        files = ImageFiles.find(data / split, frozenset(excluded.get(split, ())), classes)
        by_class: dict[str, list[str]] = {}
        for index, target in enumerate(files.targets.tolist()):
            by_class.setdefault(files.classes[target], []).append(files.path_as_text(index))
        chosen = [name for name in by_class if matches(name, subset.classes) and not matches(name, subset.without)]
        if not chosen:
            raise UserError(f"{data / split}: has no class like {subset.classes} but not {subset.without or 'any'}.")
        splits[split] = {name: by_class[name] for name in chosen}
    return splits


def _read_links(folder: Path) -> dict[str, str]:
    """The targets of the links below a folder, by their path relative to it; empty if there is no such folder."""
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder): os.readlink(path) for path in paths if os.path.islink(path)}
