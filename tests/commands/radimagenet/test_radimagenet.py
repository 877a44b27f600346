"""RadImageNet made a tree to train on: from folder and archive alike, and resumed after kills."""

import io
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
    pack,
    rows_of,
    write_lists,
)
from utils.data.dataset import ImageFolder
from utils.data.fingerprint import fingerprint
from utils.data.folders import ImageFiles, check_same_classes, find_classes
from utils.radimagenet import images as radimagenet_images
from utils.radimagenet.__main__ import main, prepare
from utils.radimagenet.lists import ImageLists
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script

# The tree


@pytest.mark.parametrize("link", ["symlink", "hardlink", "copy"])
def test_the_tree_has_the_images_and_is_read_by_the_scripts(source, output, link, capsys):
    main(["prepare", "--source", str(source), "--link", link, str(output)])
    assert contents(output) == expected(source)
    assert (output / "summary.csv").read_text() == SUMMARY
    assert rows_of(output / "missing.csv") == rows_of(output / "repeated.csv") == []
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "The lists name 17 images of 3 classes: train 9, val 4, test 4."
    assert printed[1] == "Images found:"
    assert printed[3].split() == ["CT__abd__normal", "4", "1", "2", "7"]
    assert printed[6].split() == ["all", "9", "4", "4", "17"]
    assert not any("warning" in line for line in printed)
    check_same_classes(output, {split: find_classes(output / split) for split in COUNTS})
    images = ImageFolder(output / "train", lambda image: np.asarray(image))
    assert images.classes == list(FOLDERS)
    assert np.array_equal(images.read(0).getchannel("R"), np.random.default_rng(0).integers(0, 256, (8, 9)))
    assert images.files.targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    image, original = output / "val/US__liver/val0.png", source / "radiology_ai/US/liver/val0.png"
    assert image.is_symlink() == (link == "symlink")
    assert image.samefile(original) == (link != "copy")


def test_links_are_relative_and_outlive_a_move_of_both_trees(source, output, tmp_path):
    prepare(output, source)
    link = os.readlink(output / "train/CT__abd__normal/train0.png")
    assert link == "../../../given/radiology_ai/CT/abd/normal/train0.png"
    whole = expected(source)
    (tmp_path / "mount").mkdir()
    for path in (source, output):
        path.rename(tmp_path / "mount" / path.name)
    assert contents(tmp_path / "mount" / "output") == whole


def test_links_are_right_through_links_to_folders(source, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "shortcut").symlink_to(tmp_path / "far" / "away")
    (tmp_path / "alias").symlink_to(source)
    prepare(tmp_path / "shortcut" / "output", tmp_path / "alias")
    assert contents(tmp_path / "far" / "away" / "output") == expected(source)


def test_each_prepared_folder_has_a_cache_of_its_own(source, tmp_path):
    prints = set()
    for link in ("symlink", "hardlink", "copy"):
        prepare(tmp_path / link, source, link=link)
        prints.add(fingerprint(ImageFiles.find(tmp_path / link / "train"), {}))
    prepare(tmp_path / "unpacked", archive=pack(source, tmp_path / "images.tar"))
    prints.add(fingerprint(ImageFiles.find(tmp_path / "unpacked" / "train"), {}))
    assert len(prints) == 4
    assert fingerprint(ImageFiles.find(tmp_path / "copy" / "train"), {}) in prints
    os.utime(source / "radiology_ai/US/liver/train0.png")
    assert fingerprint(ImageFiles.find(tmp_path / "symlink" / "train"), {}) not in prints


def test_radiology_ai_itself_may_be_the_source_and_the_lists_elsewhere(source, output, tmp_path, monkeypatch):
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


def test_other_columns_do_not_matter(source, output):
    for split in COUNTS:
        rows = "".join(f'7,"a ""label""",{name}\r\n' for name in filenames_of(split))
        (source / f"RadiologyAI_{split}.csv").write_bytes(f"\ufeff,label,filename\r\n{rows}\r\n".encode())
    prepare(output, source)
    assert contents(output) == expected(source)


def test_names_that_are_no_text(source, output):
    name = os.fsdecode(b"radiology_ai/US/liver/\xff.png")
    shutil.copy(source / filenames_of("val")[0], source / name)
    absent = os.fsdecode(b"radiology_ai/US/liver/\xfe.png")
    write_lists(source, {"val": [*filenames_of("val"), name, absent]})
    with pytest.raises(UserError, match="1 images that the lists name are missing"):
        prepare(output, source)
    assert (output / "val" / "US__liver" / os.fsdecode(b"\xff.png")).exists()
    assert b"val,radiology_ai/US/liver/\xfe.png\n" in (output / "missing.csv").read_bytes()


# Going on


def kill_at(monkeypatch, function: str, call: int) -> None:
    """Let a process kill itself at a call of os's function."""
    original, calls = getattr(os, function), []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    monkeypatch.setattr(radimagenet_images.os, function, counted)


@pytest.mark.parametrize(
    ("way", "function"),
    [("symlink", "symlink"), ("hardlink", "link"), ("copy", "replace"), ("copy", "utime"), ("archive", "replace")],
)
def test_killed_and_started_again_it_goes_on(source, output, tmp_path, monkeypatch, way, function):
    archive = pack(source, tmp_path / "images.tar.gz") if way == "archive" else None
    arguments = {"archive": archive} if archive else {"source": source, "link": way}
    monkeypatch.setattr(radimagenet_images, "THREADS", 1)
    with monkeypatch.context() as patches:
        kill_at(patches, function, 6)
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(output,), kwargs=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    whole, half = expected(source), contents(output)
    left = [name for name in half if name.endswith(".tmp")]
    assert len(left) == (way in ("copy", "archive"))
    assert len(half) - len(left) == 5
    assert all(half[name] == whole[name] for name in half if name not in left)
    prepare(output, **arguments)
    assert contents(output) == whole
    assert (output / "summary.csv").read_text() == SUMMARY


@pytest.mark.parametrize("way", ["symlink", "hardlink", "copy", "archive"])
def test_a_second_run_makes_nothing_anew(source, output, tmp_path, monkeypatch, way):
    archive = pack(source, tmp_path / "images.tar.gz") if way == "archive" else None
    arguments = {"archive": archive} if archive else {"source": source, "link": way}
    prepare(output, **arguments)
    made = contents(output)

    def refuse(*arguments):
        raise AssertionError(arguments)

    for name in ("symlink", "link"):
        monkeypatch.setattr(radimagenet_images.os, name, refuse)
    monkeypatch.setattr(radimagenet_images, "write", refuse)
    prepare(output, **arguments)
    assert contents(output) == made


@pytest.mark.parametrize("first", ["symlink", "hardlink", "copy", "other file", "other link"])
@pytest.mark.parametrize("then", ["symlink", "hardlink", "copy", "archive"])
def test_another_thing_in_the_place_is_named_and_kept(source, output, tmp_path, first, then):
    if first == then:
        return
    image = output / "test" / "US__liver" / "test0.png"
    if first.startswith("other"):
        image.parent.mkdir(parents=True)
        (tmp_path / "precious.png").write_text("precious")
        image.symlink_to(tmp_path / "precious.png") if first == "other link" else image.write_text("precious")
    else:
        prepare(output, source, link=first)
    before = os.lstat(image)
    archive = pack(source, tmp_path / "images.tar") if then == "archive" else None
    arguments = {"archive": archive} if archive else {"source": source, "link": then}
    if (first, then) in [("copy", "archive"), ("hardlink", "archive"), ("hardlink", "copy")]:  # the same file
        return prepare(output, **arguments)
    with pytest.raises(UserError, match=r"\.png: is there already, and is not what this run makes of "):
        prepare(output, **arguments)
    after = os.lstat(image)
    assert (after.st_ino, after.st_size, after.st_mtime) == (before.st_ino, before.st_size, before.st_mtime)


def test_what_the_lists_do_not_name_is_not_left_in_the_tree(source, output):
    prepare(output, source)
    strange = output / "train" / "US__liver" / "more.png"
    strange.write_text("")
    with pytest.raises(UserError) as caught:
        prepare(output, source)
    assert str(caught.value).startswith(f"{strange}: the lists do not name this (1 such in the folder)")
    strange.rename(output / "val" / "US__spleen")
    with pytest.raises(UserError, match="val/US__spleen: the lists do not name this"):
        prepare(output, source)
    (output / "val" / "US__spleen").unlink()
    (source / "radiology_ai/US/liver/val0.png").unlink()
    with pytest.raises(UserError, match=r"US__liver/val0\.png: is there from an earlier run, but has no source"):
        prepare(output, source, allow_missing=True)


# What is missing or named twice


def test_missing_images_are_listed_and_may_come_later(source, output, tmp_path, capsys):
    shutil.move(source / "radiology_ai/MR", tmp_path / "later")
    (source / "radiology_ai/US/liver/test0.png").rename(tmp_path / "later" / "test0.png")
    with pytest.raises(UserError) as caught:
        prepare(output, source)
    assert str(caught.value).startswith(
        f"{output}/missing.csv: 7 images that the lists name are missing, of 17; get them"
    )
    printed = capsys.readouterr().out
    assert "warning: 1 classes lack images in train or val, where training refuses the set: MR__knee__acl.\n" in printed
    assert "warning: 2 classes lack images in test, whose metrics are over the others: MR__knee__acl, US__l" in printed
    assert rows_of(output / "missing.csv") == [
        *(["train", f"radiology_ai/MR/knee/acl/train{number}.png"] for number in range(3)),
        *(["val", f"radiology_ai/MR/knee/acl/val{number}.png"] for number in range(2)),
        ["test", "radiology_ai/MR/knee/acl/test0.png"],
        ["test", "radiology_ai/US/liver/test0.png"],
    ]
    assert rows_of(output / "summary.csv")[1:] == [["MR__knee__acl", "0", "0", "0", "0"], ["US__liver", *"2103"]]
    prepare(output, source, allow_missing=True)
    (tmp_path / "later" / "test0.png").rename(source / "radiology_ai/US/liver/test0.png")
    shutil.move(tmp_path / "later", source / "radiology_ai/MR")
    prepare(output, source)
    assert contents(output) == expected(source)
    assert rows_of(output / "missing.csv") == []


def test_images_named_twice_are_reported(source, output, capsys):
    again, shared = filenames_of("train")[0], filenames_of("val")[1]
    train = [*filenames_of("train"), again, again, shared]
    write_lists(source, {"train": train, "test": [*filenames_of("test"), shared]})
    prepare(output, source)
    assert rows_of(output / "repeated.csv") == [[again, "train train train"], [shared, "train val test"]]
    printed = capsys.readouterr().out
    assert "warning: 1 images stand in several splits" in printed
    assert "warning: 1 images are named more than once in one list" in printed
    assert all((output / split / "MR__knee__acl" / "val0.png").exists() for split in COUNTS)
    assert rows_of(output / "summary.csv")[1] == ["MR__knee__acl", "4", "2", "2", "8"]


@pytest.mark.parametrize("name", ["summary.csv", "missing.csv", "repeated.csv"])
def test_a_table_of_another_hand_is_kept(source, output, name):
    output.mkdir()
    (output / name).write_text("split,class,mine\n")
    assert f"{output / name}: is there and was not made by this command; move it" in fails("--source", source, output)
    assert contents(output) == {}
    assert (output / name).read_text() == "split,class,mine\n"


# Bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "RadiologyAI_val.csv: its first line has no column 'filename'"),
        ("file,label\nradiology_ai/US/liver/a.png,x\n", "RadiologyAI_val.csv: its first line has no column 'filename'"),
        ("filename,label\n", "RadiologyAI_val.csv: names no image"),
        ("label,filename\nx,radiology_ai/US/a/a.png\nx\n", "RadiologyAI_val.csv, line 3: has no column 'filename'"),
        ("filename\n" + "a" * 200_000, "RadiologyAI_val.csv, line 2: cannot be read (field larger than"),
        ("\x89PNG\r\n\x1a\n\0\0", "RadiologyAI_val.csv: its first line has no column 'filename'"),
        (
            "filename\nradiology_ai/US/liver/a.txt\n",
            "line 2: 'radiology_ai/US/liver/a.txt' is no image; expected radio",
        ),
        ("filename\nradiology_ai/US/liver/a\0.png\n", "is no image"),
        ("filename\nradiology_ai/CT/a__b/c/a.png\nradiology_ai/CT/a/b__c/a.png\n", "both become the class CT__a__b__c"),
        *(
            (f"filename\n{folder}/a.png\n", f"line 2: {folder!r} is no folder of the layout expected, radiology_ai/")
            for folder in (
                *("elsewhere/US/liver", "/radiology_ai/US/liver", "../radiology_ai/US/liver", "radiology_ai", ""),
                *("radiology_ai/XR/chest/normal", "radiology_ai/CT/abd", "radiology_ai/US/liver/deep"),
                *("radiology_ai/CT/../normal", "radiology_ai/US/..", "radiology_ai/CT//normal", "radiology_ai/US/."),
                "radiology_ai\\US\\liver",
            )
        ),
    ],
)
def test_lists_that_are_none_are_refused_before_anything_is_made(source, output, text, message):
    (source / "RadiologyAI_val.csv").write_text(text)
    assert message in fails("--source", source, output)
    assert not output.exists()


def test_folders_that_do_not_fit_are_refused(source, output, tmp_path):
    assert "absent: holds no folder radiology_ai" in fails("--source", tmp_path / "absent", output)
    assert "is inside the source" in fails("--source", source, source / "deep" / "output")
    assert "is inside the source" in fails("--source", source / "radiology_ai", source / "output")
    assert "is inside the source" in fails("--source", source, source)
    assert "RadiologyAI_train.csv: cannot be read (No such file or directory)" in fails(
        "--source", source, "--csv-dir", tmp_path, output
    )
    assert not output.exists()
    output.write_text("precious")
    assert f"{output}: is a file; give a folder to make, or to go on with." in fails("--source", source, output)
    assert output.read_text() == "precious"
    (source / "RadiologyAI_test.csv").unlink()
    assert "RadiologyAI_test.csv: cannot be read" in fails("--source", source, tmp_path / "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_no_permission(source, output, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "this folder cannot be made (Permission denied)" in fails("--source", source, closed / "output")
    (source / "radiology_ai/US/liver").chmod(0)
    assert "US/liver: cannot read this folder (Permission denied)" in fails("--source", source, output)
    (source / "radiology_ai/US/liver").chmod(0o700)


def test_a_bad_command_is_one_sentence_and_exit_code_2(source, output, capsys):
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main(["prepare", "--archive", str(source / "absent.tar"), str(output)]))
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    archive = pack(source, source.parent / "images.tar")
    assert "--link: is for --source" in fails("--archive", archive, "--link", "symlink", output)


def test_lists_count_images_once():
    lists = ImageLists()
    lists.read("train", io.BytesIO(b"filename\nradiology_ai/US/a/1.png\nradiology_ai/US/a/1.png\n"), "list")
    assert len(lists) == 1
    assert lists.listed("US__a") == {"1.png"}
    assert lists.repeated() == {"radiology_ai/US/a/1.png": ["train", "train"]}
