"""The ways of RadImageNet's images into the tree that the scripts train on: from a folder, or from an archive."""

import functools
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from utils.data.listing import PassedOver
from utils.radimagenet.archive import Member, is_archive, read_archive
from utils.radimagenet.images import (
    Batch,
    Put,
    copy,
    copy_corrected,
    copy_member,
    find_files,
    find_there,
    hardlink,
    in_threads,
    put_all,
    put_one,
    symlink,
)
from utils.radimagenet.lists import ROOT, SPLITS, ImageLists
from utils.runtime.errors import UserError

KINDS = {"symlink": symlink, "hardlink": hardlink, "copy": copy}
BATCH = 500  # images that a thread links at once
ULTRASOUND = "US__"


class Tree:
    """OUTPUT/{train,val,test}/<class>/<image>, and what of it is there already."""

    def __init__(self, output: Path, lists: ImageLists) -> None:
        """Makes the folders. Raises UserError if one cannot be made, or holds what the lists do not name."""
        self.output, self.lists = output, lists
        self.passed_over = PassedOver()  # here and in the source
        self.there: dict[tuple[str, str], set[str]] = {}
        for split in SPLITS:
            classes = [name for name, splits in lists.names.items() if splits[split]]
            _check_named(output / split, find_there(str(output / split), self.passed_over), set(classes))
            for name in classes:
                folder = self.folder(name, split)
                self.there[name, split] = find_there(folder, self.passed_over)
                _check_named(Path(folder), self.there[name, split], lists.names[name][split])
        try:
            for name, split in self.there:
                os.makedirs(self.folder(name, split), exist_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename}: this folder cannot be made ({error.strerror}).") from None

    def folder(self, name: str, split: str) -> str:
        return os.path.join(self.output, split, name, "")

    def put(self, source: str, name: str, image: str, put: Put) -> None:
        """Put an image into all splits that list it."""
        for split in self.splits_of(name, image):
            put_one(source, self.folder(name, split) + image, image in self.there[name, split], put)

    def check_all_made(self, made: dict[str, set[str]]) -> None:
        """Raise UserError for what stands here from an earlier run, and now has no source; made: images by class."""
        for (name, split), there in self.there.items():
            gone = sorted(there - made[name])
            if gone:
                path = self.folder(name, split) + gone[0]
                raise UserError(f"{path}: is there from an earlier run, but has no source or mask now; remove it.")

    def splits_of(self, name: str, image: str) -> list[str]:
        return [split for split in SPLITS if image in self.lists.names[name][split]]


def _check_named(folder: Path, there: set[str], named: set[str]) -> None:
    strange = sorted(there - named)
    if strange:
        raise UserError(
            f"{folder / strange[0]}: the lists do not name this ({len(strange)} such in the folder); remove it, or "
            "give another OUTPUT."
        )


class Masks:
    """The correction masks of ultrasound images, in a folder or an archive; `images`: these images' stems.

    Those of an archive are known only once it was read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.in_archive = path, not path.is_dir()
        self.images: set[str] = set()
        if not self.in_archive:
            self.images = {stem(name) for name in find_files(str(path), PassedOver()) if name.endswith(".npy")}
            if not self.images:
                raise UserError(f"{path}: holds no correction mask (<image>.npy); give the folder that holds them.")
        elif not is_archive(path):
            raise UserError(f"{path}: is no folder and no .tar or .tar.gz; give where the correction masks are.")

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, str | Member]]:
        """The masks of these images, each with the image's, as paths or as an archive's members, under a bar."""
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

    def has(self, name: str, image: str) -> bool:
        """Whether an image of a class can be made: it has a mask, or needs none."""
        return not name.startswith(ULTRASOUND) or stem(image) in self.images


def stem(image: str) -> str:
    return os.path.splitext(image)[0]


def place_folder(tree: Tree, source: Path, link: str, masks: Masks | None) -> dict[str, set[str]]:
    """Link, copy or correct the images below `source`; gives the names of those found, by class."""
    folders = tree.lists.folders.items()
    found = {
        name: find_files(os.path.join(source, folder), tree.passed_over) & tree.lists.listed(name)
        for name, folder in folders
    }
    corrected = {name for name in found if masks and name.startswith(ULTRASOUND)}
    batches = list(_batches(tree, source, link, {name: found[name] for name in found.keys() - corrected}))
    with tqdm(total=sum(len(batch.names) for batch in batches), desc=link, unit=" images", disable=None) as bar:
        for count in in_threads(functools.partial(put_all, put=KINDS[link]), batches):
            bar.update(count)
    if masks:
        _correct_all(tree, source, {name: found[name] for name in corrected}, masks)
    return found


def _batches(tree: Tree, source: Path, link: str, found: dict[str, set[str]]) -> Iterator[Batch]:
    for (name, split), there in sorted(tree.there.items()):
        names = sorted(tree.lists.names[name][split] & found.get(name, set()))
        target = tree.folder(name, split)
        before = os.path.join(source, tree.lists.folders[name])
        if link == "symlink":  # relative: true wherever the file system that holds both is mounted
            before = os.path.relpath(os.path.realpath(before), os.path.realpath(target))
        for start in range(0, len(names), BATCH):
            yield Batch(os.path.join(before, ""), target, names[start : start + BATCH], there)


def _correct_all(tree: Tree, source: Path, found: dict[str, set[str]], masks: Masks) -> None:
    """Write all images that have a mask, in the order of the masks, each of which is read once."""
    images: dict[str, list[tuple[str, str]]] = defaultdict(list)  # what a mask is for
    for name in found:
        for image in found[name]:
            images[stem(image)].append((name, image))

    def correct(item: tuple[str, str | Member]) -> None:
        put = functools.partial(copy_corrected, mask=item[1])
        for name, image in images[item[0]]:
            tree.put(os.path.join(source, tree.lists.folders[name], image), name, image, put)

    for _ in in_threads(correct, masks.read(images.keys())):
        pass


def place_archive(tree: Tree, members: Iterable[Member], masks: Masks | None) -> dict[str, set[str]]:
    """Write the images among an archive's members; gives the names of those found, by class.

    Raises UserError for an image that the archive holds twice.
    """
    classes = {folder: name for name, folder in tree.lists.folders.items()}
    found: dict[str, set[str]] = {name: set() for name in tree.lists.folders}

    def named() -> Iterator[tuple[str, str, str | None, Member]]:
        for member in members:
            folder, image = os.path.split(member.name)
            folder = f"/{folder}"  # the archive may have another folder around ROOT
            name = classes.get(folder[folder.rfind(f"/{ROOT}/") + 1 :])
            if name is None or not tree.splits_of(name, image):
                continue
            if image in found[name]:
                raise UserError(f"{member.name}: stands twice in the archive; get it again.")
            found[name].add(image)
            if masks is None or not name.startswith(ULTRASOUND):
                yield name, image, None, member
            elif masks.has(name, image):
                yield name, image, masks.path_for(stem(image)), member

    def place(item: tuple[str, str, str | None, Member]) -> None:
        name, image, mask, member = item
        tree.put(member.name, name, image, functools.partial(copy_member, member=member, mask=mask))

    for _ in in_threads(place, named()):
        pass
    return found
