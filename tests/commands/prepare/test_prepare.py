"""Class folders made of a table: what goes where, resumed after a kill, and never over another file."""

import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_image
from tests.helpers.tables import fails, placed, prepare, read_rows, write_source, write_table
from utils.data import placing
from utils.data.folders import ImageFiles


@pytest.fixture
def table(tmp_path):
    return write_source(tmp_path / "source")


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def groups_by_split(data):
    groups = {}
    for row in read_rows(data / "images.csv"):
        groups.setdefault(row["split"], set()).add(row["group"])
    return groups


@pytest.mark.parametrize("link", ["symlink", "hardlink", "copy"])
def test_the_images_stand_in_their_classes_and_no_group_in_two_splits(table, data, link, capsys):
    prepare(table, data, "--group", "patient", "--link", link)
    rows = read_rows(data / "images.csv")
    assert placed(data) == {row["image"]: Path(row["source"]).read_bytes() for row in rows}
    by_image = {row["file"]: row for row in read_rows(table)}
    for row in rows:
        source = by_image[os.path.relpath(row["source"], table.parent)]
        assert (row["class"], row["group"]) == (source["label"], source["patient"])
        assert row["image"] == f"{row['split']}/{row['class']}/images__{row['group']}__{row['image'][-5:]}"
    groups = groups_by_split(data)
    assert {split: len(names) for split, names in groups.items()} == {"train": 16, "val": 2, "test": 2}
    assert len(set().union(*groups.values())) == 20
    assert Counter((row["split"], row["class"]) for row in rows)["val", "a"] == 3
    assert "image: column 'file'; label: column 'label'; group: column 'patient'" in capsys.readouterr().out
    assert {path.is_symlink() for path in (data / "train").rglob("*.png")} == {link == "symlink"}
    assert ImageFiles.find(data / "val").classes == ["a", "b"]


def test_prepare_json_holds_the_settings_and_the_counts(table, data):
    prepare(table, data, "--group", "patient", "--val", ".2", "--test", "0", "--seed", "7")
    record = json.loads((data / "prepare.json").read_text())
    assert record["finished"] is True
    assert record["settings"]["split"] == {"shares": {"train": 0.8, "val": 0.2}, "seed": 7}
    assert record["settings"]["columns"] == {"image": "file", "label": "label", "group": "patient"}
    assert record["counts"] == {"train": {"a": 24, "b": 24}, "val": {"a": 6, "b": 6}}
    assert record["groups"] == {"train": 16, "val": 4}
    assert not (data / "test").exists()


def test_the_split_of_a_column_is_kept_in_its_usual_spellings(table, data):
    prepare(table, data, "--split", "fold")
    assert {split: len(names) for split, names in placed_by_split(data).items()} == {"train": 36, "val": 12, "test": 12}


def placed_by_split(data):
    names = {}
    for name in placed(data):
        names.setdefault(name.partition("/")[0], []).append(name)
    return names


def test_the_order_of_the_rows_does_not_change_the_split(table, data, tmp_path):
    rows = [list(row.values()) for row in read_rows(table)]
    random.Random(0).shuffle(rows)
    prepare(table, data, "--group", "patient")
    prepare(write_table(table.with_name("shuffled.csv"), rows), tmp_path / "other", "--group", "patient")
    assert placed(tmp_path / "other") == placed(data)


def test_each_fold_validates_on_another_part_and_all_share_one_test_split(table, data):
    prepare(table, data, "--group", "patient", "--folds", "3", "--test", ".1")
    folds = [groups_by_split(data / f"fold_{k}") for k in range(3)]
    assert [sorted(fold) for fold in folds] == [["test", "train", "val"]] * 3
    assert folds[0]["test"] == folds[1]["test"] == folds[2]["test"]
    assert len(folds[0]["test"]) == 2
    parts = [fold["val"] for fold in folds]
    assert sorted(map(len, parts)) == [6, 6, 6]
    assert len(set.union(*parts, folds[0]["test"])) == 20
    for fold in folds:
        assert fold["train"] == set.union(*parts) - fold["val"]


@pytest.mark.parametrize(("link", "function"), [("symlink", "symlink"), ("copy", "replace")])
def test_a_killed_run_is_resumed(table, data, monkeypatch, link, function):
    original, calls = getattr(os, function), []

    def kill(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    with monkeypatch.context() as patches:
        patches.setattr(os, function, kill)
        patches.setattr(placing, "THREADS", 1)
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(table, data, "--link", link))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 5 <= len(placed(data)) <= 8  # with a temporary file
    assert json.loads((data / "prepare.json").read_text())["finished"] is False
    prepare(table, data, "--link", link)
    assert len(placed(data)) == 60


def test_the_same_command_again_makes_nothing_and_other_settings_are_refused(table, data, monkeypatch, capsys):
    prepare(table, data)
    before = placed(data)
    for function in ("symlink", "link"):
        monkeypatch.setattr(os, function, lambda *_: pytest.fail("made again"))
    prepare(table, data)
    assert "was complete; nothing was left to do" in capsys.readouterr().out
    assert "split was {'shares': {'train': 0.8, 'val': 0.1, 'test': 0.1}, 'seed': 0} and is" in fails(
        table, data, "--seed", 1
    )
    with table.open("a") as file:
        file.write("images/p0/0.png,a,p0,train\n")
    assert "was made with other settings (table_sha256 was" in fails(table, data)
    assert placed(data) == before


def test_other_files_are_reported_and_kept(table, data, tmp_path):
    prepare(table, data)
    (data / "train" / "a" / "mine.png").write_text("mine")
    assert "not in the table: mine.png" in fails(table, data)
    (data / "train" / "a" / "mine.png").unlink()
    link = next((data / "train" / "a").iterdir())
    link.unlink()
    link.write_text("mine")
    assert "exists, but is not what this run makes" in fails(table, data)
    assert link.read_text() == "mine"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "holds file, but no prepare.json" in fails(table, tmp_path / "full")


def test_missing_images_are_listed_and_added_later(table, data, capsys):
    gone = table.parent / "images" / "p3" / "1.png"
    content = gone.read_bytes()
    gone.unlink()
    (table.parent / "images" / "p4" / "0.png").write_text("no image")
    message = fails(table, data)
    assert "missing.csv: 2 of 60 images are missing or unusable" in message
    assert [row["image"] for row in read_rows(data / "missing.csv")] == ["images/p3/1.png", "images/p4/0.png"]
    assert len(placed(data)) == 58
    prepare(table, data, "--allow-missing")
    for name in ("p3/1.png", "p4/0.png"):
        (table.parent / "images" / name).write_bytes(content)
    capsys.readouterr()
    prepare(table, data)
    assert len(placed(data)) == 60
    assert read_rows(data / "missing.csv") == []


def test_a_class_whose_images_are_missing_is_a_warning_and_backslashes_are_explained(table, data, capsys):
    rows = read_rows(table)
    for row in rows:
        if row["label"] == "b" and row["fold"] == "valid":
            (table.parent / row["file"]).unlink()
    prepare(table, data, "--split", "fold", "--allow-missing")
    assert "warning: 1 class without available images in val: b; training needs" in capsys.readouterr().out
    windows = [(row["file"].replace("/", "\\"), row["label"]) for row in rows]
    message = fails(write_table(table.with_name("w.csv"), windows, ("file", "label")), data.with_name("w"))
    assert message.endswith("no such file. Write the paths with / instead of \\, and without a drive such as C:.")


def test_paths_may_lack_their_ending_and_start_in_another_folder(tmp_path, data):
    rows = [(f"x{number}", "ab"[number % 2]) for number in range(8)]
    for name, _ in rows:
        write_image(tmp_path / "elsewhere" / f"{name}.png", np.zeros((4, 4)))
    table = write_table(tmp_path / "t.tsv", rows, ("image_id", "dx"), separator="\t")
    assert "none of the images can be used; the first: " in fails(table, data, "--root", tmp_path / "elsewhere")
    assert not data.exists()
    prepare(table, data, "--root", tmp_path / "elsewhere", "--suffix", ".png", "--val", ".25", "--test", "0")
    assert sorted(map(os.path.basename, placed(data))) == [f"x{number}.png" for number in range(8)]


def test_labels_that_are_not_utf_8_are_a_warning(table, data, capsys):
    """As Excel saves "CSV" without "UTF-8"."""
    table.write_bytes(table.read_text().replace(",a,", ",métastase,").encode("cp1252"))
    prepare(table, data)
    output = capsys.readouterr().out
    assert "is not UTF-8, so 1 label lost letters: m\\udce9tastase; save it as UTF-8" in output


def test_hostile_names_stay_what_they_are(tmp_path, data):
    names = ["=1+1.png", "a\nb.png", os.fsdecode(b"\xff.png"), "\x1b[2J.png", "'q.png", "c,d.png", "-e.png", " f.png"]
    for name in names:
        write_image(tmp_path / "x" / name, np.zeros((4, 4)))
    rows = [(f"x/{name}", "ab"[number % 2]) for number, name in enumerate(names)]
    table = write_table(tmp_path / "t.csv", rows, ("file", "label"))
    prepare(table, data, "--val", ".5", "--test", "0")
    assert sorted(map(os.path.basename, placed(data))) == sorted(names)
    assert {row["source"] for row in read_rows(data / "images.csv")} == {str(tmp_path / "x" / name) for name in names}
