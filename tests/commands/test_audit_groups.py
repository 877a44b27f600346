"""--groups of the audit: patients in several splits are counted and named, and bad tables end in a sentence."""

import pytest

from tests.helpers.audits import picture, put, run, table
from tests.helpers.tables import prepare, write_source, write_table
from utils.audit.__main__ import open_files
from utils.audit.findings import NOTE, PROBLEM
from utils.audit.groups import group_findings, group_section, read_groups
from utils.runtime.errors import UserError

GROUPS = {  # of 2 + 1 + 2 images of each of two classes; one image is not in the table
    "train/a/0.png": "anna", "train/a/1.png": "bert", "val/a/0.png": "carl", "test/a/0.png": "anna",
    "test/a/1.png": "dora", "train/b/0.png": "bert", "train/b/1.png": "ella", "val/b/0.png": "anna",
    "test/b/0.png": "ella",
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate([*GROUPS, "test/b/1.png"]):
        put(tmp_path / "data" / name, picture(seed))
    return tmp_path / "data"


def test_groups_in_several_splits_are_counted_and_named(tmp_path, data):
    """anna: train, val, test; ella: train, test; 5 images."""
    rows = [(f"./{name}" if "val" in name else name, group) for name, group in GROUPS.items()]
    path = write_table(tmp_path / "groups.csv", [*rows, ("train/c/9.png", "carl")], ("image", "patient"))
    groups = read_groups(path, "patient", open_files(data))
    assert [tuple(finding) for finding in group_findings(groups)] == [
        (PROBLEM, "2 groups of 5 are in several splits, with 5 images: anna, ella. Results would be too good: split "
                  "the images by group."),
        (NOTE, "1 image without a group in the table: not checked."),
    ]  # fmt: skip
    section = group_section(groups)
    assert section.head == ["group", "train", "val", "test"]
    assert section.rows == [["anna", 1, 1, 1], ["ella", 1, 0, 1]]
    text = run(data, tmp_path, "--groups", str(path), "--group-column", "patient")
    assert "Problem: 2 groups of 5 are in several splits" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 groups of 5 are in several splits" in page and "Groups across splits" in page


def test_the_table_of_prepare_works_as_it_is(tmp_path):
    prepare(
        write_source(tmp_path / "source", 8), tmp_path / "data", "--group", "patient", "--val", ".25", "--test", ".25"
    )
    text = run(tmp_path / "data", tmp_path, "--groups", str(tmp_path / "data" / "images.csv"))
    assert "Note: None of 8 groups is in several splits." in text
    assert len(table(tmp_path / "out" / "images.csv")) == 24


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        ([], ("image", "patient"), "has no column 'group' (--group-column); its columns are image, patient"),
        ([], ("x", "group"), "no column has a usual name for the path of an image"),
        ([("a.png", "1")], ("path", "group"), "has no group for any image; expected paths such as 'train/a/0.png' in "
                                              "'path', but it has 'a.png'."),
        ([("train/a/0.png", "1"), ("train/a/0.png", "2")], ("path", "group"), "line 3: 'train/a/0.png' has another"),
        ([("train/a/0.png", "")], ("path", "group"), "has no group for any image"),
    ],
)  # fmt: skip
def test_a_table_without_groups_is_a_sentence(tmp_path, data, rows, head, message):
    path = write_table(tmp_path / "groups.csv", rows, head)
    with pytest.raises(UserError) as caught:
        run(data, tmp_path, "--groups", str(path))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
