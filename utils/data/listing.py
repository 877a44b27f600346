"""Lists the images of folders by file extension, and counts hidden entries and other files."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from utils.runtime.errors import UserError
from utils.runtime.text import printable

# torchvision's IMG_EXTENSIONS, without importing torch.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Left by macOS archives, network disks, Windows, Linux and Python, besides names that start with a dot.
LEFTOVERS = {
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "@tmp", "__macosx",
    "__pycache__", "desktop.ini", "lost+found", "recycler", "system volume information", "thumbs.db",
}  # fmt: skip
LONGEST_ENDING = 10  # characters; a longer one is part of a name with a dot
ENDINGS_SHOWN = 8


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def is_image(name: str) -> bool:
    """Whether files of this name are read as images, by extension."""
    return name.lower().endswith(IMAGE_ENDINGS)


@dataclass
class PassedOver:
    """Counts of entries that are not read.

    hidden: hidden files and folders; endings: other files by extension ("" without one); stray: images outside of
    class folders.
    """

    hidden: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    stray: int = 0

    def keep_visible(self, names: list[str]) -> list[str]:
        """The names that are not hidden. The hidden ones are counted."""
        visible = [name for name in names if not is_hidden(name)]
        self.hidden += len(names) - len(visible)
        return visible

    def add_file(self, name: str) -> None:
        ending = os.path.splitext(name)[1].lower()
        is_ending = len(ending) <= LONGEST_ENDING and any(map(str.isalpha, ending))  # DICOM names end in numbers
        self.endings[ending if is_ending else ""] += 1

    def add(self, other: "PassedOver") -> None:
        self.hidden += other.hidden
        self.endings += other.endings
        self.stray += other.stray

    def describe(self) -> str:
        """For example `skipped: 4 hidden files or folders; ignored: 12 .dcm, 3 without an ending`; "" for none."""
        common = sorted(self.endings.items(), key=lambda item: (-item[1], not item[0], item[0]))
        ignored = [f"{count} {printable(ending) or 'without an ending'}" for ending, count in common[:ENDINGS_SHOWN]]
        if len(common) > ENDINGS_SHOWN:
            ignored.append(f"{sum(count for _, count in common[ENDINGS_SHOWN:])} of other endings")
        if self.stray:
            ignored.append(f"{self.stray} {'image' if self.stray == 1 else 'images'} in no class folder")
        files = "file or folder" if self.hidden == 1 else "files or folders"
        skipped = [f"skipped: {self.hidden} hidden {files}"] if self.hidden else []
        return "; ".join(skipped + ([f"ignored: {', '.join(ignored)}"] if ignored else []))


def find_images(root: Path, passed_over: PassedOver, seen: dict[tuple[int, int], str] | None = None) -> list[str]:
    """The sorted paths of all images below a folder. Other entries are counted in `passed_over`.

    Hidden entries are skipped, but the folder itself may be hidden. seen: the folders listed so far, by device and
    inode; extended here. Raises UserError for an unreadable folder, and for a link that leads to a folder seen before.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}).")

    paths: list[str] = []
    seen = {} if seen is None else seen
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        other = seen.setdefault((status.st_dev, status.st_ino), folder)
        if other != folder:
            raise UserError(f"{folder}: a link makes this the same folder as {other}; remove the link.")
        subfolders[:] = passed_over.keep_visible(subfolders)
        for name in passed_over.keep_visible(names):
            if is_image(name):
                paths.append(os.path.join(folder, name))
            else:
                passed_over.add_file(name)
    return sorted(paths)
