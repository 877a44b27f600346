"""A small classification set of synthetic radiology images, generated from a seed; the default without --data-path."""

import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from utils.phantoms.anatomy import PAINTERS

VERSION = 2  # part of the default folder's name; raise it whenever the images change
# Classes (modality-organ-finding) and their numbers of training images, as uneven as findings in a clinic.
CLASSES = {
    "ct-abdomen-cyst": 66,
    "ct-abdomen-metastasis": 89,
    "ct-abdomen-normal": 159,
    "ct-head-haemorrhage": 103,
    "ct-head-infarct": 77,
    "ct-head-normal": 184,
    "mr-brain-normal": 247,
    "mr-brain-sclerosis": 57,
    "mr-brain-tumour": 137,
    "us-breast-carcinoma": 119,
    "us-breast-cyst": 49,
    "us-breast-normal": 213,
}
SPLIT_SHARES = {"train": 1.0, "val": 0.2, "test": 0.2}  # images per training image


def render(class_name: str, rng: np.random.Generator, size: int = 96) -> np.ndarray:
    """Draw one image of a class, uint8 (size, size).

    Raises ValueError for an unknown class or a size outside 32 to 1024.
    """
    if class_name not in CLASSES:
        raise ValueError(f"unknown class {class_name!r}; the classes are {', '.join(CLASSES)}")
    if not 32 <= size <= 1024:
        raise ValueError(f"size must be 32 to 1024 pixels, not {size}")
    organ, finding = class_name.rsplit("-", 1)
    image = PAINTERS[organ](finding, rng, size)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def image_counts(scale: float) -> dict[str, dict[str, int]]:
    """Number of images by split and class, at least 2; raises ValueError for a scale of 0 or less, or above 100."""
    if not 0 < scale <= 100:
        raise ValueError(f"scale must be above 0 and at most 100, not {scale}")
    return {
        split: {name: max(2, round(count * share * scale)) for name, count in CLASSES.items()}
        for split, share in SPLIT_SHARES.items()
    }


def write_images(root: Path, seed: int, size: int, scale: float) -> None:
    """Write every image of the set into the new folder root."""
    for split_number, (split, classes) in enumerate(image_counts(scale).items()):
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                # crc32 and not hash(), which differs between processes.
                key = [seed, split_number, zlib.crc32(name.encode()), number]
                image = render(name, np.random.default_rng(np.random.SeedSequence(key)), size)
                Image.fromarray(image).save(folder / f"{number:05d}.png", compress_level=1)  # noise hardly compresses


def generate(root: str | Path, seed: int = 0, size: int = 96, scale: float = 1.0) -> Path:
    """Generate the set as root/{train,val,test}/<class>/<number>.png, 8-bit grey, size x size; return its full path.

    Each image depends only on seed, split, class, number and size; scale multiplies the counts. The set appears at root
    in one step, complete or not at all. Raises FileExistsError if root exists, ValueError for a bad number, OSError if
    the file system refuses.
    """
    root = Path(os.path.abspath(root))
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    taken = FileExistsError(f"{root} exists already; give a path that does not exist yet")
    if os.path.lexists(root):
        raise taken
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        draft = Path(scratch) / "draft"  # the scratch folder itself is readable by its owner only
        write_images(draft, seed, size, scale)
        try:
            draft.rename(root)
        except OSError:
            if os.path.lexists(root):  # another process was faster, and its set is complete
                raise taken from None
            raise
    return root


def ensure_default() -> Path:
    """The default set's folder in $XDG_CACHE_HOME or ~/.cache, generated if absent; processes may race.

    Raises as `generate` does.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(cache) / "policy-gradient-noise-masks" / f"phantoms-v{VERSION}-seed-0"
    if not root.is_dir():
        try:
            generate(root)
        except FileExistsError:
            if not root.is_dir():  # not the set of another process, but a file in the way
                raise
    return root
