"""utils.audit: planted duplicates, blanks and unreadable files are found, counted by hand, and left out by its list."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from _normal import train as normal
from tests.conftest import SMALL
from tests.helpers.audits import CONTRADICTS, LEAK, REPEATS, census_of, left_out, picture, put, run
from utils import arguments
from utils.audit import __main__ as audit
from utils.audit import outputs
from utils.audit.duplicates import find_groups, near_pairs
from utils.audit.images import RECORD, difference_hash, measure, measure_all
from utils.audit.report import Section, as_text, normalisation, sections
from utils.data import splits as wiring_data
from utils.data.folders import ImageFiles, read_excluded
from utils.data.images import read_image
from utils.runtime.errors import UserError
from utils.runtime.text import printable


def one_pixel_changed(image: Image.Image) -> Image.Image:
    changed = image.copy()
    changed.putpixel((20, 20), (image.getpixel((20, 20)) + 40) % 256)
    return changed


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """DATA of two classes: 6 images each in train, 3 in val, 3 in test, and what the tests look for."""
    root, seed = tmp_path_factory.mktemp("planted"), 0
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        for name in "ab":
            for number in range(count):
                put(root / split / name / f"{number}.png", picture(seed := seed + 1))
    train, val, test = root / "train", root / "val", root / "test"
    put(train / "a" / "of_test.bmp", Image.open(test / "a" / "0.png").convert("RGB"))  # the same pixels, grey as colour
    put(val / "a" / "of_test.jpg", Image.open(test / "a" / "0.png"), quality=90)
    put(train / "b" / "of_val.png", ImageEnhance.Brightness(Image.open(val / "b" / "1.png")).enhance(1.1))
    put(train / "a" / "other_label.png", Image.open(train / "b" / "2.png"))
    put(train / "a" / "larger.png", Image.open(train / "a" / "1.png").resize((96, 80), Image.Resampling.BICUBIC))
    put(test / "b" / "twin.png", Image.open(test / "b" / "2.png"))
    put(train / "a" / "black.png", Image.new("L", (48, 40)))
    put(train / "b" / "black.png", Image.new("L", (48, 40)))
    put(test / "b" / "white.png", Image.new("RGB", (30, 30), (255, 255, 255)))
    (val / "b" / "broken.png").write_bytes(b"no image")
    (test / "a" / "broken.png").write_bytes((test / "a" / "1.png").read_bytes()[:200])
    return root


GROUPS = {  # by their images: across splits, across classes
    ("test/a/0.png", "val/a/of_test.jpg", "train/a/of_test.bmp"): (True, False),
    ("val/b/1.png", "train/b/of_val.png"): (True, False),
    ("train/a/other_label.png", "train/b/2.png"): (False, True),
    ("train/a/larger.png", "train/a/1.png"): (False, False),
    ("test/b/2.png", "test/b/twin.png"): (False, False),
}
LEFT_OUT = {
    *("train/a/of_test.bmp", "val/a/of_test.jpg", "train/b/of_val.png", "train/b/2.png", "train/a/other_label.png"),
    *("train/a/black.png", "train/b/black.png", "val/b/broken.png", "test/a/broken.png"),
}


@pytest.fixture(scope="module")
def audited(planted, tmp_path_factory) -> Path:
    """The folder of an audit of the planted set, its list in it."""
    output = tmp_path_factory.mktemp("audits") / "audit"
    audit.main([str(planted), "-o", str(output), "--exclude-list", str(output / "exclude.txt"), "-j", "2"])
    return output


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- Groups


def test_planted_duplicates_are_found_and_nothing_else(audited):
    rows = table(audited / "duplicates.csv")
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    found = {tuple(sorted(row["path"] for row in group)): group for group in groups.values()}
    assert found.keys() == {tuple(sorted(names)) for names in GROUPS}
    for names, (across_splits, across_classes) in GROUPS.items():
        for row in found[tuple(sorted(names))]:
            assert (row["across_splits"], row["across_classes"]) == (str(int(across_splits)), str(int(across_classes)))
            assert row["path"].startswith(f"{row['split']}/{row['class']}/")
    ordered = [[row["path"] for row in group] for group in groups.values()]
    assert ordered[0] == ["test/a/0.png", "val/a/of_test.jpg", "train/a/of_test.bmp"]  # what stays first
    assert [("train/b/2.png" in group, "val/b/1.png" in group) for group in ordered[1:3]] == [(0, 1), (1, 0)]
    kinds = {row["path"]: (row["kind"], row["distance"], row["pixels"]) for row in rows}
    assert kinds["test/b/2.png"] == kinds["test/b/twin.png"] == ("exact", "0", kinds["test/b/twin.png"][2])
    assert kinds["train/a/of_test.bmp"][1:] == kinds["test/a/0.png"][1:]
    assert kinds["val/a/of_test.jpg"][2] != kinds["test/a/0.png"][2]
    assert {kinds[path][0] for path in ("test/a/0.png", "val/b/1.png", "train/a/1.png")} == {"near"}


def test_exact_finds_the_same_pixels_only(planted, tmp_path):
    run(planted, tmp_path, "--exact")
    paths = [row["path"] for row in table(tmp_path / "out" / "duplicates.csv")]
    assert paths == [
        *("test/a/0.png", "train/a/of_test.bmp", "train/a/other_label.png", "train/b/2.png"),
        *("test/b/2.png", "test/b/twin.png"),
    ]
    assert read_excluded(tmp_path / "list") == {
        "train": {"a/of_test.bmp", "a/other_label.png", "b/2.png", "a/black.png", "b/black.png"},
        "val": {"b/broken.png"},
        "test": {"a/broken.png"},
        "": set(),
    }


def components(hashes: np.ndarray, distance: int) -> set[frozenset[int]]:
    """By comparing all pairs."""
    sets = [{index} for index in range(len(hashes))]
    for one in range(len(hashes)):
        for other in range(one):
            near = sum(int(word).bit_count() for word in hashes[one] ^ hashes[other]) <= distance
            if near and sets[one] is not sets[other]:
                sets[other] |= sets[one]
                for index in sets[one]:
                    sets[index] = sets[other]
    return {frozenset(each) for each in sets if len(each) > 1}


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(1, 4), st.integers(0, 40), st.booleans(), st.booleans()
)
def test_banded_search_finds_what_comparing_all_pairs_finds(seed, distance, words, count, sparse, blocks):
    """Of hashes around three, and of sparse ones, which share bands that are all 0; with blocks from two hashes on."""
    rng = np.random.default_rng(seed)
    bases = rng.integers(2**63, size=(3, words), dtype=np.uint64) * np.uint64(not sparse)
    bits = np.unpackbits(bases[rng.integers(3, size=count)].view(np.uint8), axis=1)
    for row in bits:
        row[rng.choice(bits.shape[1], rng.integers(12), replace=False)] ^= 1
    hashes = np.packbits(bits, axis=1).view(np.uint64).reshape(count, words)
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setattr("utils.audit.duplicates.LARGE", 2)
            patch.setattr("utils.audit.duplicates.BLOCK", 32)
        groups = find_groups(hashes, distance)
    assert {frozenset(group.tolist()) for group in groups} == components(hashes, distance)
    assert [group[0] for group in groups] == sorted(group.min() for group in groups)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 20), st.integers(0, 20), st.integers(1, 100))
def test_near_pairs_are_those_of_all_pairs(seed, distance, some, others, block):
    rng = np.random.default_rng(seed)
    one, other = (np.packbits(rng.random((count, 128)) < 0.03, axis=1).view(np.uint64) for count in (some, others))
    bits = np.unpackbits((one[:, None] ^ other).view(np.uint8).reshape(some, others, 16), axis=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.audit.duplicates.BLOCK", block)
        found = [pair for pairs in near_pairs(one, other, distance) for pair in zip(*pairs, strict=True)]
    assert found == list(map(tuple, np.argwhere(bits.sum(axis=2) <= distance).tolist()))


def test_edges_are_merged_as_they_come(monkeypatch):
    """A chain of hashes, each one bit from the next, is one group, though few edges are held at a time."""
    monkeypatch.setattr("utils.audit.duplicates.EDGES", 3)
    chain = np.packbits(np.tri(64, dtype=np.uint8), axis=1).view(np.uint64)
    assert [group.tolist() for group in find_groups(chain, 1)] == [list(range(64))]
    assert find_groups(chain, 0) == []


def test_a_hundred_thousand_alike_are_one_group_at_once():
    hashes = np.zeros((100_000, 4), np.uint64)
    hashes[7] = 2**64 - 1
    (group,) = find_groups(hashes, 3)
    assert np.array_equal(group, np.delete(np.arange(100_000), 7))


def test_neighbouring_slices_of_one_split_stay_whatever_their_labels(tmp_path):
    slices = {f"train/{'ab'[n % 2]}/{n:02}.png": (n, 2 * n) for n in range(20)}
    census = census_of(tmp_path, {**slices, "val/a/0.png": (100, 200), "test/a/0.png": (101, 240)})
    assert left_out(census) == {}
    assert [len(group) for group in census.groups] == [20]
    duplicates = next(section for section in sections(census, "") if section.title == "Duplicates")
    assert "20 images are in groups; the largest has 20, up to 38 bits from its first image." in duplicates.sentences


def test_the_same_pixels_of_different_labels_all_go_unless_one_is_evaluated(tmp_path):
    images = {"train/a/0.png": (1, 0), "train/b/0.png": (1, 0), "val/b/0.png": (1, 0)}
    images |= {"train/a/1.png": (2, 50), "train/b/1.png": (2, 50), "test/a/1.png": (2, 50)}
    images |= {"train/a/2.png": (3, 100), "train/b/2.png": (4, 101)}  # near only
    images |= {"val/b/2.png": (5, 200)}
    assert left_out(census_of(tmp_path, images)) == {
        **dict.fromkeys(("train/a/0.png", "train/b/0.png", "val/b/0.png"), CONTRADICTS),
        **dict.fromkeys(("train/a/1.png", "train/b/1.png"), LEAK),
    }


CHAIN = {"test/a/0.png": (0, 0), "val/a/0.png": (1, 3), "val/b/1.png": (2, 6), "train/a/0.png": (3, 9)}
CHAIN |= {"train/b/1.png": (4, 5), "train/b/2.png": (5, 12), "train/a/3.png": (6, 2), "train/a/4.png": (7, 4)}
CHAIN |= {"val/a/9.png": (8, 200), "train/a/9.png": (9, 230)}  # in no group


def test_leaks_are_direct_copies_of_what_stays(tmp_path):
    """Of hashes in a chain of 13 bits: val/a/0 is near test, so that train/a/4, near it and val/b/1, goes by that."""
    census = census_of(tmp_path, CHAIN)
    assert [len(group) for group in census.groups] == [8]
    assert left_out(census) == dict.fromkeys(
        ("val/a/0.png", "train/a/0.png", "train/b/1.png", "train/a/3.png", "train/a/4.png"), LEAK
    )


def test_what_is_near_only_to_a_copy_that_goes_stays(tmp_path):
    images = {"test/a/0.png": (0, 0), "val/a/0.png": (1, 3), "train/a/0.png": (2, 6), "val/a/1.png": (3, 90)}
    assert left_out(census_of(tmp_path, images)) == {"val/a/0.png": LEAK}


def test_with_exact_only_the_same_pixels_leak(tmp_path):
    images = {**CHAIN, "train/a/5.png": (0, 0), "train/b/6.png": (2, 6)}
    expected = {"train/a/5.png": LEAK, "train/b/6.png": LEAK}
    assert left_out(census_of(tmp_path, images, distance=None)) == expected


def test_of_the_same_pixels_in_one_split_one_stays(tmp_path):
    images = {
        f"{split}/a/{n}.png": (place, 50 * place) for place, split in enumerate(("train", "val", "test")) for n in "012"
    }
    images |= {"train/a/near.png": (9, 1), "train/b/0.png": (10, 200)}
    assert left_out(census_of(tmp_path, images)) == dict.fromkeys(
        ("train/a/1.png", "train/a/2.png", "val/a/1.png", "val/a/2.png"), REPEATS
    )


def test_without_test_train_gives_way_to_val(tmp_path):
    images = {"val/a/0.png": (0, 0), "val/b/1.png": (0, 0), "train/a/0.png": (1, 3), "train/a/1.png": (2, 6)}
    assert left_out(census_of(tmp_path, images)) == {"train/a/0.png": LEAK}


# --- What is measured of an image


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "x.png"),
        ("RGB", "x.png"),
        ("RGB", "x.jpg"),
        ("RGBA", "x.png"),
        ("P", "x.png"),
        ("LA", "x.png"),
        ("1", "x.bmp"),
    ],
)
def test_a_record_is_of_the_pixels_that_training_reads(mode, name, tmp_path):
    colours = np.random.default_rng(1).integers(256, size=(9, 7, 3), dtype=np.uint8)
    Image.fromarray(colours).convert(mode).save(tmp_path / name)
    record = measure(tmp_path / name)
    pixels = np.asarray(read_image(tmp_path / name)).astype(float)  # (H, W, 3)
    gray = np.asarray(read_image(tmp_path / name, gray=True)).astype(float)
    channels = np.concatenate([pixels, gray[:, :, None]], axis=2).reshape(-1, 4)
    assert record["mean"] == pytest.approx(channels.mean(0))
    assert record["square"] == pytest.approx((channels**2).mean(0))
    assert (record["width"], record["height"]) == (7, 9)
    assert record["gray"] == (pixels == pixels[:, :, :1]).all() == (mode in ("L", "LA", "1"))
    assert record["mode"].decode() == mode
    assert record["format"].decode() == {"png": "PNG", "jpg": "JPEG", "bmp": "BMP"}[name[2:]]


def test_the_same_pixels_have_one_digest_however_they_are_stored(tmp_path):
    image = picture(0, 12, 8)
    for name, stored in (
        ("plain.png", image),
        ("fast.png", image),
        ("colour.png", image.convert("RGB")),
        ("other.bmp", image),
        ("turned.png", Image.fromarray(np.asarray(image).reshape(12, 8))),
        ("tinted.png", Image.merge("RGB", (image, image, image.point(lambda level: level ^ 1)))),
    ):
        stored.save(tmp_path / name, **({"compress_level": 0} if name == "fast.png" else {}))
    digest = {path.stem: measure(path)["pixels"].tobytes() for path in tmp_path.iterdir()}
    assert digest["plain"] == digest["fast"] == digest["colour"] == digest["other"]
    assert len(set(digest.values())) == 3


def test_a_difference_hash_bears_what_does_not_change_the_picture():
    def distance(one: Image.Image, other: Image.Image) -> int:
        return int(np.bitwise_count(difference_hash(one) ^ difference_hash(other)).sum())

    for seed in range(20):
        image = picture(seed, 100, 80)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        assert distance(image, Image.open(buffer)) <= audit.DISTANCE
        assert distance(image, image.point(lambda level: level * 0.8)) <= audit.DISTANCE
        assert distance(image, one_pixel_changed(image)) <= audit.DISTANCE
        assert distance(image, image.resize((50, 40), Image.Resampling.BICUBIC)) <= audit.DISTANCE
        assert distance(image, picture(seed + 100, 100, 80)) > 30
        assert distance(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 30
    assert not difference_hash(Image.new("L", (20, 20), 90)).any()
    assert np.unpackbits(difference_hash(picture(0)).view(np.uint8))[242:].sum() == 0


def test_a_difference_hash_by_hand():
    """On its own grid of 12 x 12 nothing is resized: a ramp to the right sets half of the bits, one down the others."""
    ramp = np.tile(np.arange(0, 240, 20, dtype=np.uint8), (12, 1))
    for pixels, expected in ((ramp, [1] * 121 + [0] * 135), (ramp.T, [0] * 121 + [1] * 121 + [0] * 14)):
        bits = np.unpackbits(difference_hash(Image.fromarray(pixels)).view(np.uint8))
        assert bits.tolist() == expected


def test_mean_and_standard_deviation_by_hand(tmp_path):
    """Of a black, a white and a half-white image: each counts the same, or each pixel does."""
    half = np.zeros((4, 6), np.uint8)
    half[:2] = 255
    for name, pixels in (("0", np.zeros((2, 2))), ("1", np.full((2, 3), 255)), ("2", half)):
        put(tmp_path / "c" / f"{name}.png", Image.fromarray(pixels.astype(np.uint8)))
    records = measure_all(ImageFiles.find(tmp_path), 0).records
    mean, std = normalisation(records, np.ones(3))
    assert mean == pytest.approx([0.5] * 4)
    assert std == pytest.approx([0.5] * 4)
    mean, std = normalisation(records, records["width"] * records["height"])  # 18 white pixels of 34
    assert mean == pytest.approx([18 / 34] * 4)
    assert std == pytest.approx([np.sqrt(18 / 34 * 16 / 34)] * 4)


def test_workers_change_nothing(planted):
    files = ImageFiles.find(planted / "train")
    alone, shared = measure_all(files, 0), measure_all(files, 2)
    assert alone.records.dtype == RECORD
    assert alone.records.tobytes() == shared.records.tobytes()


# --- What is written


def test_the_report_counts_by_hand(audited, planted):
    text = (audited / "report.txt").read_text()
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert lines >= {
        f"{planted}: 35 images in 2 classes",
        *("train 18 2 0 2", "val 8 2 1 0", "test 9 2 1 1"),
        *("a 10 4 4", "b 8 4 5"),
        "2 images of val (25.00%) share a group with one of train.",
        "1 images of test (11.11%) share a group with one of train.",
        "1 images of test (11.11%) share a group with one of val.",
        *("across splits 2 0 2 5", "across classes 1 1 0 2", "within one class of one split 2 1 1 4", "all 5 2 3 11"),
        *("stays 12 6 8", "cannot be read 0 1 1", "blank, or nearly 2 0 0"),
        *("copy, exact or near, of an image of test or val 2 1 0", "same pixels, different labels 2 0 0"),
        "same pixels as an image that stays 0 0 0",
        *("train/a/black.png", "train/b/black.png", "test/b/white.png"),
    }
    assert "\n  image              reason\n  val/b/broken.png   cannot be read as an image (" in text
    assert "All are: give --gray." in text
    levels = [np.asarray(read_image(path, gray=True)) / 255 for path in (planted / "train").rglob("*.*")]
    mean = np.mean([image.mean() for image in levels])
    std = np.sqrt(np.mean([(image**2).mean() for image in levels]) - mean**2)
    assert f"For the training: --gray --mean {mean:.4f} --std {std:.4f}\n" in text


def test_every_image_has_a_line(audited):
    rows = {row["path"]: row for row in table(audited / "images.csv")}
    assert len(rows) == 35
    assert {path for path, row in rows.items() if row["left_out"]} == LEFT_OUT
    assert rows["test/b/white.png"]["blank"] == rows["train/a/black.png"]["blank"] == "1"
    assert [rows["test/b/white.png"][name] for name in ("mode", "gray", "mean", "std")] == [
        "RGB",
        "1",
        "255.000",
        "0.000",
    ]
    assert [rows["train/a/larger.png"][name] for name in ("width", "height", "format")] == ["96", "80", "PNG"]
    assert rows["val/b/broken.png"]["unreadable"].endswith("replace or remove it.")


def test_the_list_leaves_what_training_is_to_see(audited, planted):
    listed = read_excluded(audited / "exclude.txt")
    assert {f"{split}/{name}" for split, names in listed.items() for name in names} == LEFT_OUT
    parser = normal.build_parser()
    flags = [*SMALL, "--data-path", str(planted), "--exclude", str(audited / "exclude.txt")]
    splits = wiring_data.open_splits(arguments.for_fresh_start(parser, arguments.parse_given(parser, flags)))
    assert (len(splits.training), len(splits.evaluation)) == (12, 6)
    flags += ["--test-only", "--resume", "unread.pth", "--split", "test"]
    splits = wiring_data.open_splits(arguments.for_fresh_start(parser, arguments.parse_given(parser, flags)))
    assert len(splits.evaluation) == 8


def test_what_the_list_leaves_has_nothing_more_to_leave_out(audited, planted, tmp_path):
    """Near copies within a split and what the evaluated split holds are still found, and stay."""
    for path in planted.rglob("*.*"):
        name = path.relative_to(planted)
        if str(name) not in LEFT_OUT:
            put(tmp_path / "data" / name, Image.open(path))
    run(tmp_path / "data", tmp_path)
    assert not any(read_excluded(tmp_path / "list").values())
    assert [row["path"] for row in table(tmp_path / "out" / "duplicates.csv")] == [
        *("train/a/larger.png", "train/a/1.png", "test/b/2.png", "test/b/twin.png")
    ]


def test_without_test_val_stays_as_it_is(planted, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(planted / split)
    run(tmp_path / "data", tmp_path)
    listed = read_excluded(tmp_path / "list")
    assert listed["val"] == {"b/broken.png"}
    assert {"a/of_test.bmp", "b/of_val.png"} < listed["train"]


def test_a_single_split_may_be_audited(planted, tmp_path):
    run(planted / "train", tmp_path)
    assert read_excluded(tmp_path / "list")["train"] == {
        *("a/black.png", "a/other_label.png", "b/2.png", "b/black.png")
    }


def test_the_page_is_bounded(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "SHOWN_GROUPS", 2)
    monkeypatch.setattr(outputs, "SHOWN_IMAGES", 2)
    monkeypatch.setattr(outputs, "SHOWN_BLANK", 1)
    run(planted, tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<h3>") == 2
    assert page.count('<img src="data:image/jpeg;base64,') == 5
    assert "and 1 more, in duplicates.csv" in page


def test_hostile_names_reach_every_file_unharmed(tmp_path, capsys):
    data = tmp_path / "data"
    script, escape, broken = "<script>alert(1)&\"'", "a\x1b[31m", "line\nbreak"
    for number, name in enumerate((script, escape, broken)):
        for split in ("train", "test"):
            put(data / split / name / "0.png", picture(number))
            put(data / split / name / "1.png", picture(10 + number + 5 * (split == "test")))
    odd = os.fsdecode(b"caf\xe9 #.png")
    put(data / "train" / script / odd, picture(20))
    put(data / "test" / script / odd, picture(20))
    audit.main([str(data), "-o", str(tmp_path / "out"), "--exclude-list", str(tmp_path / "list"), "-j", "0"])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"a\x1b[31m" in printed
    assert "list: leaves out 3 of 14 images\nwarning: 1 more would be left out, but their names hold a line" in printed
    assert "1 of these have names that hold a line break" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert script not in page
    assert "train/&lt;script&gt;alert(1)&amp;&#34;&#39;/caf\\udce9 #.png" in page
    listed = read_excluded(tmp_path / "list")
    assert listed["train"] == {f"{script}/0.png", f"{script}/{odd}", f"{escape}/0.png"}
    assert "# and 1 whose names hold a line break: rename them\n" in (tmp_path / "list").read_text(errors="replace")
    paths = [row["path"] for row in table(tmp_path / "out" / "duplicates.csv")]
    assert sorted(paths) == sorted(
        [f"{split}/{name}/0.png" for name in (script, escape, broken) for split in ("train", "test")]
        + [f"{split}/{script}/caf\\udce9 #.png" for split in ("train", "test")]
    )


def test_numbers_are_aligned_to_the_right_and_texts_to_the_left():
    table = Section(
        "Title", [], ["name", "count", "why", "share"], [["a", 7, "x", "0.25"], ["bcdef", 100, "yz", "1e+04"]]
    )
    assert table.numeric() == [False, True, False, True]
    assert as_text("Head", [table]).splitlines()[3:] == [
        "  name   count  why  share",
        "  a          7  x     0.25",
        "  bcdef    100  yz   1e+04",
    ]


def test_printable_escapes_what_a_terminal_would_obey():
    assert printable("Grüße 影 \x07\x1b[2J\udce9") == r"Grüße 影 \x07\x1b[2J\udce9"


# --- Bad input


def refuse(*words: object, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        audit.main([*map(str, words), "-j", "0"])
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_sentence(planted, tmp_path):
    out = tmp_path / "out"
    refuse(tmp_path / "absent", "-o", out, match="absent: no such folder; expected DATA/")
    refuse(planted / "train" / "a", "-o", out, match="train/a: holds no class folders")
    (tmp_path / "hollow" / "train" / "dark").mkdir(parents=True)
    refuse(tmp_path / "hollow", "-o", out, match="train/dark: holds no image")
    refuse(planted, "-o", planted / "audit", match="audit: lies within the images' folder")
    refuse(planted, "-o", out, "--distance", 243, match="--distance 243: expected at most 242")
    refuse(planted, "-o", planted, match="lies within the images' folder")
    refuse(planted, "-o", out, "--exclude-list", tmp_path / "no" / "list", match="no: no such folder")
    (tmp_path / "list").write_text("mine")
    refuse(planted, "-o", out, "--exclude-list", tmp_path / "list", match="list: already exists; give another --excl")
    refuse(planted / "train" / "..", "-o", tmp_path / "list", match="list: cannot be made")
    (tmp_path / "other").symlink_to(planted / "train")
    refuse(tmp_path / "other", "-o", out, "--exclude-list", tmp_path / "new", match="has no folder train, val, test")
    assert not out.exists()
    assert (tmp_path / "list").read_text() == "mine"


def test_what_is_there_is_written_over_only_when_told_to(planted, tmp_path):
    (tmp_path / "report.txt").write_text("mine")
    refuse(planted / "train", "-o", tmp_path, match="already exists; give another --output, or --overwrite")
    assert (tmp_path / "report.txt").read_text() == "mine"
    audit.main([str(planted / "train"), "-o", str(tmp_path), "--overwrite", "-j", "0"])
    assert (tmp_path / "report.txt").read_text().startswith(f"{planted}/train: 18 images in 2 classes\n")


def test_a_set_that_cannot_be_read_at_all_is_reported(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        (tmp_path / "data" / split / "a" / "0.png").write_text("no image")
    run(tmp_path / "data", tmp_path)
    text = (tmp_path / "out" / "report.txt").read_text()
    assert text.count("No image can be read.") == 2
    assert "no image of these classes can be read: train/a (1 image), val/a (1 image); replace the images" in text
    assert not any(read_excluded(tmp_path / "list").values())
    assert "val lacks" not in text


def test_classes_that_a_split_lacks_are_named(tmp_path):
    for seed, name in enumerate(("train/a/0.png", "train/b/0.png", "train/b/1.png", "val/b/0.png", "val/c/0.png")):
        put(tmp_path / "data" / name, picture(seed))
    run(tmp_path / "data", tmp_path)
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "train: 1 to 2 images a class, 2.0 to 1.\n" in text
    assert "train lacks 1 classes that other splits have: c.\n" in text
    assert "val lacks 1 classes that other splits have: a.\n" in text
