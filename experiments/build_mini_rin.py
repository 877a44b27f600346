"""Build mini-RIN, 5,981 radiology images in 13 classes, from its three public downloads, with the original splits.

An image's id is the first 12 hex digits of the SHA-1 of its path in the downloads, such as
`busi/data/benign/images/benign (2).png`, so the file names alone decide where each image belongs. The manifest,
mini_rin.csv, was taken from the copy that the experiments use. The downloads themselves were not available when this
command was written, and it was never run on them. But the three layouts in LAYOUTS, with the downloads' file numbers,
reproduce every id in the manifest.

The copy is 8-bit grey with the quantisation tables of Pillow's JPEG quality 85. Its resampling is not documented. This
command uses Lanczos and rounds the longer side, so pixels may differ from the copy.
"""

import csv
import hashlib
import io
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from tqdm import tqdm

from utils.data.images import read_image
from utils.data.listing import PassedOver, find_images
from utils.data.placing import find_existing
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.text import print_line

MANIFEST = Path(__file__).with_name("mini_rin.csv")
LAYOUTS = {  # by download, the path from which an id is computed; {} stand for the last parts of a file's path
    "brain": "brain/{}/{}/{}",
    "busi": "busi/data/{}/images/{}",
    "mednist": "mednist/resized/{}/{}",
}
EXPECTED = {
    "brain": "{Training,Testing}/{glioma,meningioma,no,pituitary}_tumor/<image>, such as 'Training/glioma_tumor/gg "
    "(1).jpg'",
    "busi": "{benign,malignant,normal}/<image>, or .../images/<image>, such as 'benign/benign (2).png'",
    "mednist": "{AbdomenCT,BreastMRI,CXR,ChestCT,Hand,HeadCT}/<image>, such as 'Hand/000053.jpeg'",
}
SHORTER_SIDE = 224
QUALITY = 85


def build(downloads: dict[str, Path], output: Path, manifest: Path = MANIFEST) -> None:
    """Write OUTPUT/<split>/<class>/<id>.jpg for each image in the manifest that is not there yet.

    downloads: the folders of "brain", "busi" and "mednist". Raises UserError for bad input, for other files in the
    folders of OUTPUT, and, after writing all other images, for images that the downloads lack.
    """
    places = read_manifest(manifest)
    sources: dict[str, str] = {}
    for download, folder in downloads.items():
        sources |= find_sources(download, folder, places.keys())
    prepare_folders(output, places.values())
    absent = {image: place for image, place in places.items() if not (output / place).exists()}
    missing = [place for image, place in absent.items() if image not in sources]
    for image, place in tqdm(absent.items(), desc="mini-RIN", unit=" images", disable=None):
        if image in sources:
            write_atomically(output / place, as_jpeg(read_image(Path(sources[image]), gray=True)))
    complete, written = len(places) - len(missing), len(absent) - len(missing)
    print_line(f"{output}: {complete} of {len(places)} images, {written} of them written now")
    if missing:
        names = ", ".join(f"{place.parent.name} {place.stem}" for place in missing[:5])
        raise UserError(
            f"{output}: {len(missing)} of {len(places)} images are missing, such as {names}. Check that the downloads "
            "are complete and their files named as in --help, then start again to add the missing images."
        )


def read_manifest(path: Path) -> dict[str, Path]:
    """The path of each image in OUTPUT, <split>/<class>/<id>.jpg, by id, in the manifest's order."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return {row["id"]: Path(row["split"], row["class"], f"{row['id']}.jpg") for row in csv.DictReader(file)}


def find_sources(download: str, folder: Path, wanted: Collection[str]) -> dict[str, str]:
    """The paths of the wanted images below a download's folder, by id.

    Raises UserError if there are none, if an image occurs twice, and as `find_images` does.
    """
    sources: dict[str, str] = {}
    passed_over = PassedOver()
    for path in find_images(Path(os.path.abspath(folder)), passed_over):
        image = image_id(source_path(download, path))
        if image in wanted:
            if image in sources:
                raise UserError(f"{path}: has the name of the same image as {sources[image]}. Remove one of them.")
            sources[image] = path
    if content := passed_over.describe():
        print_line(f"--{download} {folder}: {content}")
    if not sources:
        raise UserError(f"--{download} {folder}: holds no image of mini-RIN. Expected {EXPECTED[download]}.")
    return sources


def source_path(download: str, path: str) -> str:
    """The path from which an image's id is computed, regardless of other folders around it."""
    layout = LAYOUTS[download]
    names = Path(path).parts
    if download == "busi" and names[-2:-1] == ("images",):
        names = (*names[:-2], names[-1])
    return layout.format(*names[-layout.count("{}") :])


def image_id(source: str) -> str:
    """The first 12 hex digits of the SHA-1 of a path in the downloads."""
    return hashlib.sha1(os.fsencode(source)).hexdigest()[:12]


def prepare_folders(output: Path, places: Collection[Path]) -> None:
    """Create the folders of all classes, and remove half-written files left by a kill.

    Raises UserError for files that do not belong to mini-RIN, because a training would use them as images of the set.
    """
    contents: dict[Path, set[str]] = defaultdict(set)  # by folder, the names that it may hold
    for place in places:
        contents[place.parent.parent].add(place.parent.name)
        contents[place.parent].add(place.name)
    for folder, names in contents.items():
        if others := find_existing(str(output / folder), PassedOver()) - names:
            path = output / folder / min(others)
            raise UserError(f"{path}: does not belong to mini-RIN. Remove it, or give another OUTPUT.")
        (output / folder).mkdir(parents=True, exist_ok=True)


def as_jpeg(image: Image.Image) -> bytes:
    """The JPEG file of a grey image, its shorter side reduced to at most 224 pixels, without metadata."""
    scale = SHORTER_SIDE / min(image.size)
    if scale < 1:
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    image.info.clear()
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        description="Write mini-RIN to OUTPUT/{train,val,test}/<class>/<id>.jpg from its three public downloads, "
        "unpacked, with their original file names. An image is found by its name and the last folders above it; other "
        "folders around these do not matter. Started again after a kill or with missing images, the command adds what "
        "is missing and leaves existing images unchanged."
    )
    titles = ("Brain Tumor Classification (MRI)", "BUSI, breast ultrasound images", "MedNIST, 64 px")
    for (download, expected), title in zip(EXPECTED.items(), titles, strict=True):
        text = f"{title}: contains {expected}"
        parser.add_argument(f"--{download}", required=True, type=expanded_path, metavar="FOLDER", help=text)
    parser.add_argument("output", type=expanded_path, metavar="OUTPUT", help="folder to create or to complete")
    options = parser.parse_args(argv)
    build({download: getattr(options, download) for download in LAYOUTS}, options.output)


if __name__ == "__main__":
    run_script(main)
