"""experiments/build_mini_rin: ids, splits and pixels from generated downloads, and the committed manifest."""

import csv
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import build_mini_rin
from experiments.build_mini_rin import MANIFEST, build, image_id, read_manifest, source_path
from tests.conftest import ROOT
from utils.choices import SPLITS
from utils.data.folders import read_excluded
from utils.runtime.errors import UserError

MINI_RIN = ROOT.parent / "shared" / "data" / "mini-rin"
COUNTS = {  # images in train, val and test, from the description of the copy
    "brain": (1864, 286, 430),
    "busi": (509, 77, 117),
    "mednist": (1949, 299, 450),
}
KNOWN = {  # ids in the copy, and the paths that give them
    "9b395197b547": "brain/Training/glioma_tumor/gg (1).jpg",
    "8a150e636455": "brain/Testing/no_tumor/image.jpg",
    "6bbf8cb1f9d6": "busi/data/benign/images/benign (2).png",
    "44fac1249fb3": "mednist/resized/Hand/000053.jpeg",
}
MADE = {  # images of the generated downloads: place, mode and size
    "brain/Training/glioma_tumor/gg (7).jpg": ("train/mr-brain-glioma", "RGB", (300, 501)),
    "brain/Testing/no_tumor/3.jpg": ("test/mr-brain-normal", "L", (448, 448)),
    "busi/data/benign/images/benign (9).png": ("val/us-breast-benign", "RGBA", (562, 471)),
    "mednist/resized/Hand/000012.jpeg": ("train/xr-hand-any", "L", (64, 48)),
}
MADE_SIZES = [(224, 374), (224, 224), (267, 224), (64, 48)]  # 501 * 224 / 300 = 374.08, 562 * 224 / 471 = 267.28


@pytest.fixture
def downloads(tmp_path):
    """Folders of three generated downloads: flat shades 40, 80, 120, 160, and images that are not in the manifest."""
    root = tmp_path / "from"
    for shade, (path, (_, mode, size)) in zip((40, 80, 120, 160), MADE.items(), strict=True):
        put(root / path, Image.new("L", size, shade).convert(mode))
    put(root / "busi/data/benign/masks/benign (9).png", Image.new("L", (562, 471)))
    put(root / "brain/Training/glioma_tumor/gg (8).jpg", Image.new("L", (30, 30)))
    return {name: root / name for name in COUNTS}


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "manifest.csv"
    lines = [f"{image_id(source)},{place.replace('/', ',')}\n" for source, (place, *_) in MADE.items()]
    path.write_text("id,split,class\n" + "".join(lines))
    return path


def put(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def places():
    return [f"{place}/{image_id(source)}.jpg" for source, (place, *_) in MADE.items()]


def files(folder: Path):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_image_in_the_manifest_is_written_grey_and_small(downloads, manifest, tmp_path, capsys):
    output = tmp_path / "mini-rin"
    build(downloads, output, manifest)
    assert files(output) == sorted(places())
    for place, size, shade in zip(places(), MADE_SIZES, (40, 80, 120, 160), strict=True):
        with Image.open(output / place) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", size)
            assert np.abs(np.asarray(image).astype(int) - shade).max() <= 1
    assert capsys.readouterr().out == f"{output}: 4 of 4 images, 4 of them written now\n"


def test_files_have_pillows_quality_85_and_no_metadata(tmp_path):
    image = Image.new("L", (32, 32), 7)
    image.info["comment"] = b"Jane Doe"
    (tmp_path / "a.jpg").write_bytes(build_mini_rin.as_jpeg(image))
    Image.new("L", (32, 32), 7).save(tmp_path / "b.jpg", quality=85)
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()


def test_a_second_start_completes_the_set_and_keeps_existing_files(downloads, manifest, tmp_path, capsys):
    output, (first, second, *_) = tmp_path / "mini-rin", places()
    (output / first).parent.mkdir(parents=True)
    (output / first).write_bytes(b"there already")
    (output / first).with_name(f".{Path(first).name}.123.tmp").write_bytes(b"half")
    build(downloads, output, manifest)
    assert (output / first).read_bytes() == b"there already"
    assert files(output) == sorted(places())
    before = (output / second).stat().st_mtime_ns
    build(downloads, output, manifest)
    assert (output / second).stat().st_mtime_ns == before
    assert capsys.readouterr().out.splitlines()[1] == f"{output}: 4 of 4 images, 0 of them written now"


def test_hidden_files_are_ignored(downloads, manifest, tmp_path, capsys):
    for folder in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(downloads["busi"] / "data", downloads["busi"] / folder / "data")
    (tmp_path / "out" / "train" / ".ipynb_checkpoints").mkdir(parents=True)
    build(downloads, tmp_path / "out", manifest)
    assert files(tmp_path / "out") == sorted(places())
    assert f"--busi {downloads['busi']}: skipped: 2 hidden files or folders\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("from/busi/data/benign/images/benign (9).png", r"benign \(9\)\.png: cannot be read as an image"),
        ("from/mednist/MedNIST/Hand/000012.jpeg", r"000012\.jpeg: has the name of the same image as .*000012\.jpeg"),
        ("mini-rin/train/xr-hand-any/mine.jpg", r"mine\.jpg: does not belong to mini-RIN"),
        ("mini-rin/val/mine/1.jpg", "val/mine: does not belong to mini-RIN"),
    ],
)
def test_bad_input_is_named(path, message, downloads, manifest, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(b"no image")
    with pytest.raises(UserError, match=message):
        build(downloads, tmp_path / "mini-rin", manifest)


def test_the_command_finds_known_images_and_counts_the_missing_ones(tmp_path, capsys):
    output = tmp_path / "mini-rin"
    for path in KNOWN.values():
        put(tmp_path / path, Image.new("L", (8, 8)))
    words = [word for name in COUNTS for word in (f"--{name}", str(tmp_path / name))]
    wrong = [word.replace("/busi", "/brain") for word in words]
    sentence = f"--busi {tmp_path}/brain: holds no image of mini-RIN. Expected {build_mini_rin.EXPECTED['busi']}."
    with pytest.raises(UserError, match=re.escape(sentence)):
        build_mini_rin.main([*wrong, str(output)])
    assert not output.exists()
    with pytest.raises(UserError) as refused:
        build_mini_rin.main([*words, str(output)])
    manifest = {image: str(place) for image, place in read_manifest(MANIFEST).items()}
    assert files(output) == sorted(manifest[image] for image in KNOWN)
    assert capsys.readouterr().out == f"{output}: 4 of 5981 images, 4 of them written now\n"
    first = list(csv.DictReader(MANIFEST.open()))[:5]  # none of them is one of KNOWN
    named = ", ".join(f"{row['class']} {row['id']}" for row in first)
    assert str(refused.value).startswith(f"{output}: 5977 of 5981 images are missing, such as {named}. Check")


@pytest.mark.parametrize(
    ("download", "path", "source"),
    [
        ("brain", "/x/archive/Training/no_tumor/1.jpg", "brain/Training/no_tumor/1.jpg"),
        ("busi", "/x/Dataset_BUSI_with_GT/benign/benign (2).png", "busi/data/benign/images/benign (2).png"),
        ("busi", "/x/data/benign/images/benign (2).png", "busi/data/benign/images/benign (2).png"),
        ("busi", "/x/data/benign/masks/benign (2).png", "busi/data/masks/images/benign (2).png"),
        ("mednist", "/x/MedNIST/Hand/000053.jpeg", "mednist/resized/Hand/000053.jpeg"),
    ],
)
def test_folders_around_a_download_do_not_matter(download, path, source):
    assert source_path(download, path) == source


def test_the_manifest_has_the_counts_of_the_copy():
    rows = list(csv.DictReader(MANIFEST.open()))
    assert len(rows) == len({row["id"] for row in rows}) == 5981 and len({row["class"] for row in rows}) == 13
    assert rows == sorted(rows, key=lambda row: (SPLITS.index(row["split"]), row["class"], row["id"]))
    downloads = {"mr-brain": "brain", "us-breast": "busi"}
    counts = Counter((downloads.get(row["class"].rpartition("-")[0], "mednist"), row["split"]) for row in rows)
    assert {name: tuple(counts[name, split] for split in SPLITS) for name in COUNTS} == COUNTS


def test_the_exclude_list_names_images_of_train_and_val():
    places = {str(place) for place in read_manifest(MANIFEST).values()}
    excluded = read_excluded(ROOT / "experiments" / "mini_rin_exclude.txt")
    assert {f"{split}/{name}" for split in ("train", "val") for name in excluded[split]} <= places
    assert {split: len(names) for split, names in excluded.items()} == {"train": 36, "val": 5, "test": 0, "": 0}


@pytest.mark.skipif(not MINI_RIN.is_dir(), reason=f"the real images are not at {MINI_RIN}")
def test_the_manifest_lists_exactly_the_copy():
    assert files(MINI_RIN) == sorted(map(str, read_manifest(MANIFEST).values()))
