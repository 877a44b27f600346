"""RadImageNet prepared for training: the tree, its counts, runs resumed after kills, and bad input."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.radimagenet import (
    COUNTS,
    FOLDERS,
    SUMMARY,
    contents,
    expected,
    fails,
    filenames_of,
    origin,
    pack,
    rows_of,
    write_lists,
)
from utils.data import placing
from utils.data.dataset import ImageFolder
from utils.data.folders import check_same_classes, find_classes
from utils.radimagenet.__main__ import main, prepare
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script

WAYS = ("symlink", "hardlink", "copy", "archive")

# The tree


@pytest.mark.parametrize("link", WAYS[:3])
def test_the_tree_holds_the_images_and_can_be_trained_on(source, output, link, capsys):
    main(["prepare", "--source", str(source), "--link", link, str(output)])
    assert contents(output) == expected(source)
    assert (output / "summary.csv").read_text() == SUMMARY
    assert rows_of(output / "missing.csv") == rows_of(output / "repeated.csv") == []
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "The lists name 17 images of 3 classes: train 9, val 4, test 4."
    assert printed[3].split() == ["CT__abd__normal", "4", "1", "2", "7"]
    assert printed[6].split() == ["all", "9", "4", "4", "17"]
    assert not any("warning" in line for line in printed)
    check_same_classes(output, {split: find_classes(output / split) for split in COUNTS})
    images = ImageFolder(output / "train", lambda image: np.asarray(image))
    assert images.classes == list(FOLDERS)
    assert images.files.targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    image, original = output / "val/US__liver/val0.png", source / "radiology_ai/US/liver/val0.png"
    assert image.is_symlink() == (link == "symlink")
    assert image.samefile(original) == (link != "copy")


def test_links_are_relative_and_survive_moving_both_trees(source, output, tmp_path):
    (tmp_path / "shortcut").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(source)
    prepare(tmp_path / "shortcut" / "output", tmp_path / "alias")
    link = os.readlink(output / "train/CT__abd__normal/train0.png")
    assert link == "../../../given/radiology_ai/CT/abd/normal/train0.png"
    whole = expected(source)
    (tmp_path / "mount").mkdir()
    for path in (source, output):
        path.rename(tmp_path / "mount" / path.name)
    assert contents(tmp_path / "mount" / "output") == whole


def test_the_source_may_be_radiology_ai_and_the_lists_elsewhere(source, output, tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    for path in source.glob("*.csv"):
        path.rename(tmp_path / "lists" / path.name)
    prepare(output, source / "radiology_ai", csv_dir=tmp_path / "lists")
    assert contents(output) == expected(source)
    for path in (tmp_path / "lists").iterdir():
        path.rename(source / "radiology_ai" / path.name)
    monkeypatch.chdir(source)
    prepare(tmp_path / "second", Path("radiology_ai"))
    assert contents(tmp_path / "second") == expected(source)


def test_file_names_that_are_not_text_are_kept(source, output):
    name = os.fsdecode(b"radiology_ai/US/liver/\xff.png")
    shutil.copy(source / filenames_of("val")[0], source / name)
    absent = os.fsdecode(b"radiology_ai/US/liver/\xfe.png")
    write_lists(source, {"val": [*filenames_of("val"), name, absent]})
    with pytest.raises(UserError, match="1 of 19 listed images are missing"):
        prepare(output, source)
    assert (output / "val" / "US__liver" / os.fsdecode(b"\xff.png")).exists()
    assert b"val,radiology_ai/US/liver/\xfe.png\n" in (output / "missing.csv").read_bytes()


# Resumed runs


def kill_at(monkeypatch, function: str, call: int) -> None:
    """Let the process kill itself at this call of a function of os."""
    original, calls = getattr(os, function), []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    monkeypatch.setattr(os, function, counted)


@pytest.mark.parametrize(
    ("way", "function"),
    [("symlink", "symlink"), ("hardlink", "link"), ("copy", "replace"), ("copy", "utime"), ("archive", "replace")],
)
def test_a_killed_run_is_resumed(source, output, monkeypatch, way, function):
    arguments = origin(way, source)
    monkeypatch.setattr(placing, "THREADS", 1)
    with monkeypatch.context() as patches:
        kill_at(patches, function, 6)
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(output,), kwargs=arguments)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    whole, half = expected(source), contents(output)
    temporary = [name for name in half if name.endswith(".tmp")]
    assert len(temporary) == (way in ("copy", "archive"))
    assert len(half) - len(temporary) == 5
    assert all(half[name] == whole[name] for name in half if name not in temporary)
    prepare(output, **arguments)
    assert contents(output) == whole
    assert (output / "summary.csv").read_text() == SUMMARY


@pytest.mark.parametrize("way", WAYS)
def test_a_second_run_writes_nothing(source, output, monkeypatch, way):
    arguments = origin(way, source)
    prepare(output, **arguments)
    made = contents(output)
    for module, name in ((os, "symlink"), (os, "link"), (placing, "write")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("written again"))
    prepare(output, **arguments)
    assert contents(output) == made


SAME_FILE = [("copy", "archive"), ("hardlink", "archive"), ("hardlink", "copy")]


@pytest.mark.parametrize(
    ("first", "then"), [(first, then) for first in (*WAYS[:3], "file", "link") for then in WAYS if first != then]
)
def test_another_file_in_the_place_of_an_image_is_reported_and_kept(source, output, tmp_path, first, then):
    image = output / "test" / "US__liver" / "test0.png"
    if first in WAYS:
        prepare(output, source, link=first)
    else:
        image.parent.mkdir(parents=True)
        (tmp_path / "precious.png").write_text("precious")
        image.symlink_to(tmp_path / "precious.png") if first == "link" else image.write_text("precious")
    before = os.lstat(image)
    if (first, then) in SAME_FILE:
        prepare(output, **origin(then, source))
    else:
        with pytest.raises(UserError, match=r"\.png: exists, but is not what this run makes of "):
            prepare(output, **origin(then, source))
    after = os.lstat(image)
    assert (after.st_ino, after.st_size, after.st_mtime) == (before.st_ino, before.st_size, before.st_mtime)


def test_unlisted_and_outdated_files_in_the_tree_are_refused(source, output):
    prepare(output, source)
    unlisted = output / "train" / "US__liver" / "more.png"
    unlisted.write_text("")
    assert fails("--source", source, output).startswith(f"{unlisted.parent}: not in the lists: more.png; remove")
    unlisted.rename(output / "val" / "US__spleen")
    assert "val: not in the lists: US__spleen" in fails("--source", source, output)
    (output / "val" / "US__spleen").unlink()
    (source / "radiology_ai/US/liver/val0.png").unlink()
    message = fails("--source", source, "--allow-missing", output)
    assert "US__liver/val0.png: exists from an earlier run, but has no source" in message


# Missing and repeated images


def test_a_source_without_any_listed_image_is_not_called_incomplete(source, output):
    for folder in ("CT", "MR", "US"):
        shutil.rmtree(source / "radiology_ai" / folder)
        (source / "radiology_ai" / folder).mkdir()
    message = fails("--source", source, output)
    assert message == (
        f"{output}/missing.csv: 17 of 17 listed images are missing; give the --source or --archive that holds "
        "radiology_ai/CT/abd/normal/train0.png."
    )


def test_missing_images_are_listed_and_may_be_added_later(source, output, tmp_path, capsys):
    shutil.move(source / "radiology_ai/MR", tmp_path / "later")
    (source / "radiology_ai/US/liver/test0.png").rename(tmp_path / "later" / "test0.png")
    message = fails("--source", source, output)
    assert message.startswith(f"{output}/missing.csv: 7 of 17 listed images are missing; add them")
    printed = capsys.readouterr().out
    assert "warning: 1 classes lack images in train or val; training refuses the set: MR__knee__acl.\n" in printed
    assert "warning: 2 classes lack images in test; its metrics are over the others: MR__knee__acl, US__l" in printed
    missing = rows_of(output / "missing.csv")
    assert len(missing) == 7
    assert missing[0] == ["train", "radiology_ai/MR/knee/acl/train0.png"]
    assert missing[-1] == ["test", "radiology_ai/US/liver/test0.png"]
    assert rows_of(output / "summary.csv")[1:] == [["MR__knee__acl", "0", "0", "0", "0"], ["US__liver", *"2103"]]
    prepare(output, source, allow_missing=True)
    (tmp_path / "later" / "test0.png").rename(source / "radiology_ai/US/liver/test0.png")
    shutil.move(tmp_path / "later", source / "radiology_ai/MR")
    prepare(output, source)
    assert contents(output) == expected(source)
    assert rows_of(output / "missing.csv") == []


def test_repeated_images_are_reported_and_counted_once(source, output, capsys):
    again, shared = filenames_of("train")[0], filenames_of("val")[1]
    train = [*filenames_of("train"), again, again, shared]
    write_lists(source, {"train": train, "test": [*filenames_of("test"), shared]})
    prepare(output, source)
    assert rows_of(output / "repeated.csv") == [[again, "train train train"], [shared, "train val test"]]
    printed = capsys.readouterr().out
    assert "The lists name 19 images of 3 classes: train 10, val 4, test 5.\n" in printed
    assert "warning: 1 images are in several splits" in printed
    assert "warning: 1 images are more than once in one list" in printed
    assert all((output / split / "MR__knee__acl" / "val0.png").exists() for split in COUNTS)
    assert rows_of(output / "summary.csv")[1] == ["MR__knee__acl", "4", "2", "2", "8"]


@pytest.mark.parametrize("name", ["summary.csv", "missing.csv", "repeated.csv"])
def test_a_table_that_the_command_did_not_make_is_kept(source, output, name):
    output.mkdir()
    (output / name).write_text("split,class,mine\n")
    assert f"{output / name}: exists and was not made by this command; move it" in fails("--source", source, output)
    assert contents(output) == {}
    assert (output / name).read_text() == "split,class,mine\n"


# Bad folders and commands


def test_folders_that_do_not_fit_are_refused(source, output, tmp_path):
    assert "absent: holds no folder radiology_ai" in fails("--source", tmp_path / "absent", output)
    for given, inside in ((source, "deep/output"), (source / "radiology_ai", "output"), (source, ".")):
        assert "is inside the source" in fails("--source", given, source / inside)
    message = fails("--source", source, "--csv-dir", tmp_path, output)
    assert "RadiologyAI_train.csv: unreadable (No such file or directory)" in message
    assert not output.exists()
    output.write_text("precious")
    assert f"{output}: is a file; give a new folder, or one to resume." in fails("--source", source, output)
    assert output.read_text() == "precious"
    (source / "RadiologyAI_test.csv").unlink()
    assert "RadiologyAI_test.csv: unreadable" in fails("--source", source, tmp_path / "new")


def test_a_bad_command_is_one_sentence_and_exit_code_2(source, output, capsys):
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main(["prepare", "--archive", str(source / "absent.tar"), str(output)]))
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    archive = pack(source, source.parent / "images.tar")
    assert "--link: applies to --source only" in fails("--archive", archive, "--link", "symlink", output)
