"""The audit's rule: which images are left out, and which classes keep theirs."""

import unicodedata

import pytest

from tests.helpers.audits import CONTRADICTS, LEAK, REPEATS, census_of, left_out, picture, put, run
from utils.audit import outputs
from utils.audit.report import sections
from utils.data.folders import ImageFiles, read_excluded

# Images by name: their pixels, and their places on a line. Those at most 3 apart are near copies.
NEAR = 0.984
CHAIN = {"test/a/0.png": (0, 0), "val/a/0.png": (1, 3), "val/b/1.png": (2, 6), "train/a/0.png": (3, 9)}
CHAIN |= {"train/b/1.png": (4, 5), "train/b/2.png": (5, 12), "train/a/3.png": (6, 2), "train/a/4.png": (7, 4)}
CHAIN |= {"val/a/9.png": (8, 200), "train/a/9.png": (9, 230)}  # not in the chain

IDENTICAL = {"train/a/0.png": (1, 0), "train/b/0.png": (1, 0), "val/b/0.png": (1, 0)}
IDENTICAL |= {"train/a/1.png": (2, 50), "train/b/1.png": (2, 50), "test/a/1.png": (2, 50)}
IDENTICAL |= {"train/a/2.png": (3, 100), "train/b/2.png": (4, 101)}  # near only
IDENTICAL |= {"val/b/2.png": (5, 200)}

REPEATED = {f"{split}/a/{n}.png": (i, 50 * i) for i, split in enumerate(("train", "val", "test")) for n in "012"}
REPEATED |= {"train/a/near.png": (9, 1), "train/b/0.png": (10, 200)}


RULES = {
    # val/a/0 is near test, so train/a/4, which is near val/a/0 and val/b/1, is compared with val/b/1.
    "direct copies of what stays leak": (
        (CHAIN, NEAR),
        {LEAK: {"val/a/0.png", "train/a/0.png", "train/b/1.png", "train/a/3.png", "train/a/4.png"}},
    ),
    "copies of a copy that is left out stay": (
        ({"test/a/0.png": (0, 0), "val/a/0.png": (1, 3), "train/a/0.png": (2, 6), "val/a/1.png": (3, 90)}, NEAR),
        {LEAK: {"val/a/0.png"}},
    ),
    "with --exact only identical pixels leak": (
        ({**CHAIN, "train/a/5.png": (0, 0), "train/b/6.png": (2, 6)}, None),
        {LEAK: {"train/a/5.png", "train/b/6.png"}},
    ),
    "without test, val stays as it is": (
        ({"val/a/0.png": (0, 0), "val/b/1.png": (0, 0), "train/a/0.png": (1, 3), "train/a/1.png": (2, 6)}, NEAR),
        {LEAK: {"train/a/0.png"}},
    ),
    "identical pixels with different labels are left out unless one is evaluated": (
        (IDENTICAL, NEAR),
        {CONTRADICTS: {"train/a/0.png", "train/b/0.png", "val/b/0.png"}, LEAK: {"train/a/1.png", "train/b/1.png"}},
    ),
    "of identical pixels in one split one stays": (
        (REPEATED, NEAR),
        {REPEATS: {"train/a/1.png", "train/a/2.png", "val/a/1.png", "val/a/2.png"}},
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_images_are_left_out_by_the_rule(tmp_path, rule):
    (images, correlation), expected = RULES[rule]
    reasons = {name: reason for reason, names in expected.items() for name in names}
    assert left_out(census_of(tmp_path, images, correlation)) == reasons


def test_neighbouring_slices_of_one_split_stay_whatever_their_labels(tmp_path):
    slices = {f"train/{'ab'[n % 2]}/{n:02}.png": (n, 2 * n) for n in range(20)}
    census = census_of(tmp_path, {**slices, "val/a/0.png": (100, 200), "test/a/0.png": (101, 240)})
    assert left_out(census) == {}
    assert [len(group) for group in census.groups] == [20]
    duplicates = next(section for section in sections(census, "") if section.title == "Duplicates")
    assert (
        "20 images are in groups; the largest has 20, each of which correlates by at least 0.81 with the first."
        in duplicates.sentences
    )


def test_no_class_of_a_split_is_left_without_images(tmp_path):
    images = {"test/a/0.png": (0, 0), "val/a/0.png": (0, 0), "train/a/0.png": (1, 1), "train/a/1.png": (2, 2)}
    images |= {"train/b/0.png": (3, 100), "train/c/0.png": (3, 100), "train/c/1.png": (3, 100)}
    images |= {"val/b/0.png": (4, 150), "train/b/1.png": (4, 150), "test/b/0.png": (5, 200)}
    images |= {"train/d/0.png": (7, 151), "train/d/1.png": (6, 230)}
    census = census_of(tmp_path, images)
    assert left_out(census) == {"train/d/0.png": LEAK}
    kept = ["train/a (2 images)", "train/b (2 images)", "train/c (2 images)", "val/a (1 image)"]
    assert census.kept_classes(readable=True) == kept
    assert census.kept_classes(readable=False) == []
    message = f"Kept against the rule, which would leave these classes without a readable image: {', '.join(kept)}."
    assert message in next(part.sentences for part in sections(census, "") if part.title == "What to leave out")
    listed = outputs.exclude_list(census, "").decode()
    assert message in listed.replace("\n# ", " ")
    (tmp_path / "list").write_text(listed)
    excluded = read_excluded(tmp_path / "list")
    for split in ("train", "val", "test"):
        assert ImageFiles.find(tmp_path / split, excluded[split]).empty_classes() == []


def test_unreadable_images_are_listed_unless_they_are_a_whole_class(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        put(tmp_path / "data" / name, picture(len(name) + ord(name[-7])))
    for name in ("train/a/1.png", "train/c/0.png", "train/c/1.png"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("no image")
    text = run(tmp_path / "data", tmp_path)
    assert read_excluded(tmp_path / "list")["train"] == {"a/1.png"}
    assert "Not listed, although these classes have no readable image: train/c (2 images); replace the images" in text


def test_a_set_without_a_readable_image_is_reported(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        (tmp_path / "data" / split / "a" / "0.png").write_text("no image")
    text = run(tmp_path / "data", tmp_path)
    assert "A single class, a: the training refuses this set. Expected DATA/{train,val,test}/<class>/<image>.\n" in text
    assert text.count("No image can be read.") == 2
    assert "these classes have no readable image: train/a (1 image), val/a (1 image); replace the images" in text
    assert not any(read_excluded(tmp_path / "list").values())
    assert "val lacks" not in text


def test_hidden_copies_take_no_image_out(tmp_path):
    data = tmp_path / "data"
    for seed, name in enumerate(("train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png", "test/b/0.png")):
        put(data / name, picture(seed))
        put(data / name.split("/")[0] / ".ipynb_checkpoints" / f"{seed}.png", picture(seed))
    (data / "train" / "a" / "._0.png").write_bytes(b"\0\5\26\7")
    (data / "train" / "a" / "0.dcm").touch()
    (data / "train" / "a" / "1.dcm").touch()
    (data / "test" / "a").mkdir()
    text = run(data, tmp_path)
    assert not any(read_excluded(tmp_path / "list").values())
    assert "train: skipped: 2 hidden files or folders; ignored: 2 .dcm.\n" in text
    assert "Warning: train/a: more files are ignored than read; convert" in text
    assert "test lacks 1 classes of other splits: a.\n" in text
    assert "  test        1        1           0      0\n" in text


def test_classes_that_a_split_lacks_are_named(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Schädel") for form in ("NFC", "NFD"))
    names = ("train/a", "train/b", "train/b", f"train/{composed}", "val/b", "val/c", f"val/{decomposed}")
    for number, name in enumerate(names):
        put(tmp_path / "data" / name / f"{number}.png", picture(number))
    text = run(tmp_path / "data", tmp_path)
    assert "train: 1 to 2 images per class, 2.0 to 1.\n" in text
    assert f"train lacks 2 classes of other splits: {decomposed}, c." in text
    assert f"val lacks 2 classes of other splits: {composed}, a." in text
    assert r"'Scha\u0308del' and 'Sch\xe4del' look the same but differ in their Unicode form" in text
