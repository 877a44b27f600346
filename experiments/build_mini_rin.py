"""Make mini-RIN, 5,981 radiology images of 13 classes, from its three public downloads, with the very same splits.

An image's id is the first 12 hex digits of the SHA-1 of its path among the downloads, such as
`busi/data/benign/images/benign (2).png`: names alone tell which image belongs where. mini_rin.csv, the manifest, was
read off the copy that the experiments use. The downloads were not at hand when this was written and this command never
saw them; but run over their files' numbers, the three layouts of LAYOUTS give every id of the manifest again.

The copy is 8-bit grey, with the quantisation tables of Pillow's JPEG of quality 85; how it was resampled is not
documented. Lanczos, and rounding the longer side, are the choice of this command: pixels may differ from the copy's.
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
from utils.radimagenet.images import find_there
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.text import print_line

MANIFEST = Path(__file__).with_name("mini_rin.csv")
LAYOUTS = {  # by download: the path that an id is made of; {} stand for the last names of a file's path
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
NAMES_SHOWN = 5  # of missing images


def build(downloads: dict[str, Path], output: Path, manifest: Path = MANIFEST) -> None:
    """Write OUTPUT/<split>/<class>/<id>.jpg of each image of the manifest that is not there yet.

    downloads: the folders of "brain", "busi" and "mednist". Raises UserError for bad input, for an OUTPUT that holds
    anything else in these folders, and, when all the rest is done, for images that the downloads lack.
    """
    places = read_manifest(manifest)
    sources: dict[str, str] = {}
    for download, folder in downloads.items():
        sources |= find_sources(download, folder, places.keys())
    prepare_folders(output, places.values())
    absent = {image: place for image, place in places.items() if not (output / place).exists()}
    wanted = {image: place for image, place in absent.items() if image in sources}
    for image, place in tqdm(wanted.items(), desc="mini-RIN", unit=" images", disable=None):
        write_atomically(output / place, as_jpeg(read_image(Path(sources[image]), gray=True)))
    missing = [place for image, place in absent.items() if image not in sources]
    here = len(places) - len(missing)
    print_line(f"{output}: {here} of {len(places)} images, {len(wanted)} of them written now")
    if missing:
        raise UserError(
            f"{output}: {len(missing)} of {len(places)} images are missing, such as "
            f"{', '.join(f'{place.parent.name} {place.stem}' for place in missing[:NAMES_SHOWN])}: check that the "
            "downloads are whole and their files named as in --help, then start again: it goes on."
        )


def read_manifest(path: Path) -> dict[str, Path]:
    """By id, in the manifest's order, the image's place in OUTPUT: <split>/<class>/<id>.jpg."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return {row["id"]: Path(row["split"], row["class"], f"{row['id']}.jpg") for row in csv.DictReader(file)}


def find_sources(download: str, folder: Path, wanted: Collection[str]) -> dict[str, str]:
    """By id the paths of those images below a download's folder that are wanted.

    Raises UserError if there is none, or one twice, and as `find_images`.
    """
    sources: dict[str, str] = {}
    passed_over = PassedOver()
    for path in find_images(Path(os.path.abspath(folder)), passed_over):
        image = image_id(source_path(download, path))
        if image in wanted:
            if image in sources:
                raise UserError(f"{path}: by its name the same image as {sources[image]}; give a folder that has one.")
            sources[image] = path
    if content := passed_over.describe():
        print_line(f"--{download} {folder}: {content}")
    if not sources:
        raise UserError(f"--{download} {folder}: holds no image of mini-RIN; expected {EXPECTED[download]}.")
    return sources


def source_path(download: str, path: str) -> str:
    """What an image's path is among the downloads, whatever folders its own download has around it."""
    layout = LAYOUTS[download]
    names = Path(path).parts
    if download == "busi" and names[-2:-1] == ("images",):
        names = (*names[:-2], names[-1])
    return layout.format(*names[-layout.count("{}") :])


def image_id(source: str) -> str:
    """The first 12 hex digits of the SHA-1 of a path among the downloads."""
    return hashlib.sha1(os.fsencode(source)).hexdigest()[:12]


def prepare_folders(output: Path, places: Collection[Path]) -> None:
    """Make the folders of all classes, and remove what a kill has left half-written.

    Raises UserError for what is there and not of mini-RIN: a training would take it for images of the set.
    """
    contents: dict[Path, set[str]] = defaultdict(set)  # by folder, what it may hold
    for place in places:
        contents[place.parent.parent].add(place.parent.name)
        contents[place.parent].add(place.name)
    for folder, names in contents.items():
        others = find_there(str(output / folder), PassedOver()) - names
        if others:
            raise UserError(f"{output / folder / min(others)}: is not of mini-RIN; remove it, or give another OUTPUT.")
        try:
            (output / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be made ({error.strerror}); give another OUTPUT.") from None


def as_jpeg(image: Image.Image) -> bytes:
    """A grey image's file, the shorter side brought down to 224 px if it is longer; no metadata is kept."""
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
        description="Make OUTPUT/{train,val,test}/<class>/<id>.jpg of mini-RIN from its three public downloads, "
        "unpacked, with the files' names as they came: an image is found by its name and the last folders above it, "
        "whatever stands around these. Killed, or with images missing, it goes on when started again; an image that is "
        "there is left as it is."
    )
    for download, title in (
        ("brain", "Brain Tumor Classification (MRI)"),
        ("busi", "BUSI, breast ultrasound images"),
        ("mednist", "MedNIST, 64 px"),
    ):
        parser.add_argument(
            f"--{download}",
            required=True,
            type=expanded_path,
            metavar="FOLDER",
            help=f"{title}: holds {EXPECTED[download]}",
        )
    parser.add_argument("output", type=expanded_path, metavar="OUTPUT", help="folder to make, or to go on with")
    options = parser.parse_args(argv)
    build({download: getattr(options, download) for download in LAYOUTS}, options.output)


if __name__ == "__main__":
    run_script(main)
