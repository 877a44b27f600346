"""The audit command: planted duplicates, blank and unreadable images are found, counted and listed."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from _normal import train as normal
from tests.conftest import SMALL
from tests.helpers.audits import picture, put, run, table
from utils import arguments
from utils.audit import __main__ as audit
from utils.audit import outputs
from utils.audit.findings import CHECK, Finding
from utils.audit.images import RECORD, measure_all
from utils.audit.report import Section, as_text
from utils.data.folders import ImageFiles, read_excluded
from utils.data.images import read_image
from utils.data.splits import open_splits
from utils.runtime.errors import UserError


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """DATA of two classes: 6 images each in train, 3 in val, 3 in test, and the planted copies and faults."""
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


GROUPS = [  # the worst first; kind of the group, whether it is across splits and classes, and its images in order
    ("near", "1", "0", ["test/a/0.png", "val/a/of_test.jpg", "train/a/of_test.bmp"]),
    ("near", "1", "0", ["val/b/1.png", "train/b/of_val.png"]),
    ("exact", "0", "1", ["train/a/other_label.png", "train/b/2.png"]),
    ("near", "0", "0", ["train/a/larger.png", "train/a/1.png"]),
    ("exact", "0", "0", ["test/b/2.png", "test/b/twin.png"]),
]
LEFT_OUT = {
    *("train/a/of_test.bmp", "val/a/of_test.jpg", "train/b/of_val.png", "train/b/2.png", "train/a/other_label.png"),
    *("train/a/black.png", "train/b/black.png", "val/b/broken.png", "test/a/broken.png"),
}


@pytest.fixture(scope="module")
def audited(planted, tmp_path_factory) -> Path:
    """Folder with the reports of the planted set in out, and the list."""
    folder = tmp_path_factory.mktemp("audited")
    run(planted, folder, "-j", "2")
    return folder


def listed_names(path: Path) -> set[str]:
    return {f"{split}/{name}" for split, names in read_excluded(path).items() for name in names}


def test_planted_duplicates_are_found_and_nothing_else(audited):
    rows = table(audited / "out" / "duplicates.csv")
    groups = []
    for number in dict.fromkeys(row["group"] for row in rows):
        group = [row for row in rows if row["group"] == number]
        first = group[0]
        assert all(row["path"].startswith(f"{row['split']}/{row['class']}/") for row in group)
        paths = [row["path"] for row in group]
        groups.append((first["kind"], first["across_splits"], first["across_classes"], paths))
    assert groups == GROUPS
    by_path = {row["path"]: row for row in rows}
    test, copy, jpeg = (by_path[path] for path in ("test/a/0.png", "train/a/of_test.bmp", "val/a/of_test.jpg"))
    assert (test["correlation"], copy["correlation"]) == ("1.0000", "1.0000")
    assert 0.98 <= float(jpeg["correlation"]) < 1
    assert test["pixels"] == copy["pixels"] != jpeg["pixels"]


def test_exact_finds_identical_pixels_only(planted, tmp_path):
    run(planted, tmp_path, "--exact")
    paths = [row["path"] for row in table(tmp_path / "out" / "duplicates.csv")]
    exact = ["test/a/0.png", "train/a/of_test.bmp", "train/a/other_label.png", "train/b/2.png"]
    assert paths == [*exact, "test/b/2.png", "test/b/twin.png"]
    assert listed_names(tmp_path / "list") == LEFT_OUT - {"val/a/of_test.jpg", "train/b/of_val.png"}


def test_workers_change_nothing(planted):
    files = ImageFiles.find(planted / "train")
    alone, shared = measure_all(files, 0), measure_all(files, 2)
    assert alone.records.dtype == RECORD
    assert alone.records.tobytes() == shared.records.tobytes()


# Reports


def test_the_report_counts_by_hand(audited, planted):
    text = (audited / "out" / "report.txt").read_text()
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


def test_every_image_has_a_row(audited):
    rows = {row["path"]: row for row in table(audited / "out" / "images.csv")}
    assert len(rows) == 35
    assert {path for path, row in rows.items() if row["left_out"]} == LEFT_OUT
    assert {path for path, row in rows.items() if row["blank"] == "1"} == {
        *("train/a/black.png", "train/b/black.png", "test/b/white.png")
    }
    white, larger = rows["test/b/white.png"], rows["train/a/larger.png"]
    assert [white[name] for name in ("mode", "gray", "mean", "std")] == ["RGB", "1", "255.000", "0.000"]
    assert [larger[name] for name in ("width", "height", "format")] == ["96", "80", "PNG"]
    assert rows["val/b/broken.png"]["unreadable"].endswith("replace or remove it.")


def test_the_list_is_applied_by_training_and_evaluation(audited, planted):
    assert listed_names(audited / "list") == LEFT_OUT
    parser = normal.build_parser()
    flags = [*SMALL, "--data-path", str(planted), "--exclude", str(audited / "list")]
    splits = open_splits(arguments.for_fresh_start(parser, arguments.parse_given(parser, flags)))
    assert (len(splits.training), len(splits.evaluation)) == (12, 6)
    flags += ["--test-only", "--resume", "unread.pth", "--split", "test"]
    splits = open_splits(arguments.for_fresh_start(parser, arguments.parse_given(parser, flags)))
    assert len(splits.evaluation) == 8


def test_a_single_split_may_be_audited(planted, tmp_path):
    run(planted / "train", tmp_path)
    assert listed_names(tmp_path / "list") == {
        *("train/a/black.png", "train/a/other_label.png", "train/b/2.png", "train/b/black.png")
    }


def test_the_page_begins_with_findings_and_the_worst_groups(audited):
    page = (audited / "out" / "report.html").read_text()
    order = ["<h2>Findings</h2>", ">Problem.</strong> 1 image of test (11.11%) is a copy of images of val", ">Check.",
             ">Copies</h2>", "Group 0:", ">Blank images</h2>", ">Splits</h2>", ">Unreadable files</h2>"]  # fmt: skip
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert page.count("Blank images</h2>") == 1


def test_the_page_shows_a_limited_number_of_groups_and_images(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "SHOWN_GROUPS", 2)
    monkeypatch.setattr(outputs, "SHOWN_IMAGES", 2)
    monkeypatch.setattr(outputs, "SHOWN_BLANK", 1)
    run(planted, tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<h3>") == 2
    assert page.count('<img src="data:image/jpeg;base64,') == 5
    assert "and 1 more, in duplicates.csv" in page


def test_hostile_names_are_harmless_in_every_file(tmp_path, capsys):
    data = tmp_path / "data"
    script, escape, broken = "<script>alert(1)&\"'", "a\x1b[31m", "line\nbreak"
    for number, name in enumerate((script, escape, broken)):
        for split in ("train", "test"):
            put(data / split / name / "0.png", picture(number))
            put(data / split / name / "1.png", picture(10 + number + 5 * (split == "test")))
    odd = os.fsdecode(b"caf\xe9 #.png")
    for split in ("train", "test"):
        put(data / split / script / odd, picture(20))
    run(data, tmp_path)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"a\x1b[31m" in printed
    assert "list: leaves out 3 of 14 images\nwarning: 1 more should be left out, but their names contain" in printed
    assert "1 of these have a line break in the name" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert script not in page
    assert "train/&lt;script&gt;alert(1)&amp;&#34;&#39;/caf\\udce9 #.png" in page
    assert read_excluded(tmp_path / "list")["train"] == {f"{script}/0.png", f"{script}/{odd}", f"{escape}/0.png"}
    assert "# and 1 with a line break in the name: rename them\n" in (tmp_path / "list").read_text(errors="replace")
    names = [*(f"{name}/0.png" for name in (script, escape, broken)), f"{script}/caf\\udce9 #.png"]
    paths = [row["path"] for row in table(tmp_path / "out" / "duplicates.csv")]
    assert sorted(paths) == sorted(f"{split}/{name}" for split in ("train", "test") for name in names)


def test_numbers_are_aligned_to_the_right_and_texts_to_the_left():
    section = Section("Title", [], ["name", "count", "why"], [["a", "0.5", "x"], ["bcd", 100, "yz"]])
    assert section.numeric() == [False, True, False]
    assert as_text("Head", [Finding(CHECK, "1 thing.")], [section]).splitlines()[2:] == [
        *("Findings", "  Check: 1 thing.", "", "Title"),
        "  name  count  why",
        "  a       0.5  x",
        "  bcd     100  yz",
    ]


# Bad input


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
    refuse(planted, "-o", planted / "audit", match="audit: is inside the image folder")
    refuse(planted, "-o", planted, match="is inside the image folder")
    refuse(planted, "-o", out, "--correlation", 0.5, match="--correlation 0.5: expected a number from 0.8 to 1")
    (tmp_path / "list").write_text("mine")
    refuse(planted, "-o", out, "--exclude-list", tmp_path / "list" / "new", match="list: cannot be created")
    refuse(planted, "-o", out, "--exclude-list", tmp_path / "list", match="list: already exists; give another --excl")
    refuse(planted, "-o", out, "--exclude-list", tmp_path, "--overwrite", match="already exists; give another --excl")
    refuse(planted / "train" / "..", "-o", tmp_path / "list", match="list: cannot be created")
    (tmp_path / "other").symlink_to(planted / "train")
    refuse(tmp_path / "other", "-o", out, "--exclude-list", tmp_path / "new", match="has no folder train, val, test")
    assert not out.exists()
    assert (tmp_path / "list").read_text() == "mine"


def test_existing_reports_are_replaced_only_with_overwrite(planted, tmp_path):
    (tmp_path / "report.txt").write_text("mine")
    refuse(planted / "train", "-o", tmp_path, match="already exists; give another --output, or --overwrite")
    assert (tmp_path / "report.txt").read_text() == "mine"
    audit.main([str(planted / "train"), "-o", str(tmp_path), "--overwrite", "-j", "0"])
    assert (tmp_path / "report.txt").read_text().startswith(f"{planted}/train: 18 images in 2 classes\n")
