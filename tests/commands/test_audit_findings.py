"""The findings of an audit, counted by hand."""

import numpy as np

from tests.helpers.audits import census_of
from utils.audit.findings import CHECK, NOTE, PROBLEM, findings
from utils.audit.rule import Census


def found(census: Census) -> list[tuple[str, str]]:
    return [tuple(finding) for finding in findings(census)]


def distinct(names: list[str]) -> dict[str, tuple[int, int]]:
    """Images that are no copies of each other."""
    return {name: (number, 10 * number) for number, name in enumerate(names)}


def test_a_set_without_faults_has_only_notes(tmp_path):
    names = [f"{split}/{name}/{n}.png" for split in ("train", "val") for name in "ab" for n in range(3)]
    census = census_of(tmp_path, distinct(names))
    assert found(census) == [
        (CHECK, "2 classes with fewer than 10 images in train: a, b."),
        (NOTE, "No problem in 12 images."),
    ]
    census.records["gray"] = True
    assert found(census)[-1] == (NOTE, "All 12 readable images are grey: train with --gray.")


def test_copies_and_labels_are_counted(tmp_path):
    images = {
        **{f"train/a/{n}.png": (n, 10 * n) for n in range(10)},
        **{f"train/b/{n}.png": (20 + n, 10 * n + 100) for n in range(10)},
        "train/a/again.png": (0, 0),  # the pixels of train/a/0.png
        "train/b/label.png": (1, 10),  # the pixels of train/a/1.png
        "val/a/near.png": (50, 22),  # near train/a/2.png
        "val/b/0.png": (51, 220),
        "test/a/copy.png": (3, 30),  # the pixels of train/a/3.png
        "test/b/0.png": (53, 230),
        "test/b/1.png": (54, 240),
        "test/b/2.png": (55, 250),
    }
    assert found(census_of(tmp_path, images)) == [
        (PROBLEM, "1 image of test (25.00%) is a copy of images of train, directly or in a chain: results on test "
                  "would be too good."),
        (PROBLEM, "1 image of val (50.00%) is a copy of images of train, directly or in a chain: results on val "
                  "would be too good."),
        (PROBLEM, "2 images with the same pixels as an image of another label."),
        (CHECK, "1 image repeats the pixels of another one of the same class and split."),
        (NOTE, "5 images to leave out: --exclude-list writes the list, --exclude reads it."),
    ]  # fmt: skip


def test_files_and_classes_are_counted(tmp_path):
    names = [f"train/a/{n:02}.png" for n in range(21)]
    names += ["train/b/0.png", "train/c/0.png", "val/a/0.png", "val/b/0.png", "test/a/0.png"]
    census = census_of(tmp_path, {name: (number, 10 * number) for number, name in enumerate(names)})
    census.records["width"][0] = 0
    census.blank[1:3] = True
    assert found(census) == [
        (PROBLEM, "1 image cannot be read: the training stops there without --bad-images skip."),
        (PROBLEM, "1 class without images in val: c."),
        (CHECK, "2 images are blank, or nearly."),
        (CHECK, "2 classes with fewer than 10 images in train: b, c."),
        (CHECK, "The largest class of train has 21 times as many images as the smallest. Judge results by macro F1 or "
                "balanced accuracy."),
        (CHECK, "2 classes without images in test: b, c."),
    ]  # fmt: skip


def test_a_single_class_and_unreadable_images_only(tmp_path):
    census = census_of(tmp_path, {"train/a/0.png": (0, 0)})
    census.records["width"] = 0
    census.reason[:] = 0
    assert np.array_equal(census.readable(), [False])
    assert [severity for severity, _ in found(census)] == [PROBLEM, PROBLEM, CHECK]
    assert (PROBLEM, "1 class only, a: the training needs two or more.") in found(census)
