"""Places RadImageNet's images in the tree for training: from a folder, or from an archive."""

import functools
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from utils.data.listing import PassedOver
from utils.data.placing import KINDS, Batch, Tree, find_files, in_threads, put_all
from utils.radimagenet.archive import Member, is_archive, read_archive
from utils.radimagenet.images import copy_corrected, copy_member
from utils.radimagenet.lists import ROOT, ImageLists
from utils.runtime.errors import UserError

BATCH = 500  # images that a thread places at once
ULTRASOUND = "US__"


class Masks:
    """Correction masks of ultrasound images, in a folder or an archive.

    images: stems of the images with a mask; for an archive they are known only after it was read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.in_archive = path, not path.is_dir()
        self.images: set[str] = set()
        if not self.in_archive:
            self.images = {stem(name) for name in find_files(str(path), PassedOver()) if name.endswith(".npy")}
            if not self.images:
                raise UserError(f"{path}: holds no correction mask (<image>.npy); give the folder with the masks.")
        elif not is_archive(path):
            raise UserError(f"{path}: not a folder, .tar or .tar.gz; give the folder or archive of correction masks.")

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, str | Member]]:
        """Stem and mask of each wanted image, with a progress bar; a mask is a path, or a member of the archive."""
        if not self.in_archive:
            for image in tqdm(sorted(self.images & wanted), desc="correct", unit=" masks", disable=None):
                yield image, self.path_for(image)
            return
        for member in read_archive(self.path, (".npy",), "correct"):
            image = stem(os.path.basename(member.name))
            if image in wanted:
                if image in self.images:
                    raise UserError(f"{self.path}: holds two masks named {image}.npy; remove one.")
                self.images.add(image)
                yield image, member._replace(name=f"{self.path}: {member.name}")

    def path_for(self, image: str) -> str:
        return os.path.join(self.path, f"{image}.npy")

    def allow(self, name: str, image: str) -> bool:
        """Whether an image of a class can be made: it has a mask, or needs none."""
        return not name.startswith(ULTRASOUND) or stem(image) in self.images


def stem(image: str) -> str:
    return os.path.splitext(image)[0]


def place_folder(tree: Tree, lists: ImageLists, source: Path, link: str, masks: Masks | None) -> dict[str, set[str]]:
    """Link, copy or correct the listed images below `source`; return the names of the available ones by class."""
    available = {
        name: find_files(os.path.join(source, folder), tree.passed_over) & lists.listed(name)
        for name, folder in lists.folders.items()
    }
    corrected = {name for name in available if masks and name.startswith(ULTRASOUND)}
    batches = list(
        _batches(tree, lists, source, link, {name: available[name] for name in available.keys() - corrected})
    )
    with tqdm(total=sum(len(batch.names) for batch in batches), desc=link, unit=" images", disable=None) as bar:
        for count in in_threads(functools.partial(put_all, put=KINDS[link]), batches):
            bar.update(count)
    if masks:
        _correct_all(tree, lists, source, {name: available[name] for name in corrected}, masks)
    return available


def _batches(tree: Tree, lists: ImageLists, source: Path, link: str, available: dict[str, set[str]]) -> Iterator[Batch]:
    for (name, split), existing in sorted(tree.existing.items()):
        names = sorted(lists.names[name][split] & available.get(name, set()))
        target = tree.folder(name, split)
        folder = os.path.join(source, lists.folders[name])
        if link == "symlink":  # relative, so that the links hold wherever the file system with both trees is mounted
            folder = os.path.relpath(os.path.realpath(folder), os.path.realpath(target))
        for start in range(0, len(names), BATCH):
            yield Batch(os.path.join(folder, ""), target, names[start : start + BATCH], existing)


def _correct_all(tree: Tree, lists: ImageLists, source: Path, available: dict[str, set[str]], masks: Masks) -> None:
    """Write all images with a mask, in the order of the masks, so that each mask is read once."""
    images: dict[str, list[tuple[str, str]]] = defaultdict(list)  # (class, image) by stem
    for name in available:
        for image in available[name]:
            images[stem(image)].append((name, image))

    def correct(item: tuple[str, str | Member]) -> None:
        mask_stem, mask = item
        for name, image in images[mask_stem]:
            path = os.path.join(source, lists.folders[name], image)
            tree.put(path, name, image, functools.partial(copy_corrected, mask=mask))

    for _ in in_threads(correct, masks.read(images.keys())):
        pass


def place_archive(tree: Tree, lists: ImageLists, members: Iterable[Member], masks: Masks | None) -> dict[str, set[str]]:
    """Write the listed images of an archive; return the names of the available ones by class.

    Raises UserError for an image that is twice in the archive.
    """
    classes = {folder: name for name, folder in lists.folders.items()}
    available: dict[str, set[str]] = {name: set() for name in lists.folders}

    def listed() -> Iterator[tuple[str, str, Member]]:
        for member in members:
            folder, image = os.path.split(member.name)
            folder = f"/{folder}"  # the archive may have other folders around ROOT
            name = classes.get(folder[folder.rfind(f"/{ROOT}/") + 1 :])
            if name is None or not tree.splits_of(name, image):
                continue
            if image in available[name]:
                raise UserError(f"{member.name}: is twice in the archive; download it again.")
            available[name].add(image)
            if masks is None or masks.allow(name, image):
                yield name, image, member

    def place(item: tuple[str, str, Member]) -> None:
        name, image, member = item
        mask = masks.path_for(stem(image)) if masks and name.startswith(ULTRASOUND) else None
        tree.put(member.name, name, image, functools.partial(copy_member, member=member, mask=mask))

    for _ in in_threads(place, listed()):
        pass
    return available
