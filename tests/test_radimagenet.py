"""RadImageNet made a tree to train on: the same from folder and archive, resumed after kills, and nothing hostile."""

import csv
import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import MakesAFolder, write_image
from utils.cache_build import fingerprint
from utils.data import ImageFolder
from utils.errors import UserError, run_script
from utils.folders import ImageFiles, check_same_classes, find_classes
from utils.radimagenet import images as radimagenet_images
from utils.radimagenet.__main__ import main, prepare
from utils.radimagenet.lists import ImageLists
from utils.radimagenet.masks import correct, read_mask, resize

FOLDERS = {"CT__abd__normal": "CT/abd/normal", "MR__knee__acl": "MR/knee/acl", "US__liver": "US/liver"}
COUNTS = {"train": (4, 3, 2), "val": (1, 2, 1), "test": (2, 1, 1)}
SUMMARY = """\
class,train,val,test,total
CT__abd__normal,4,1,2,7
MR__knee__acl,3,2,1,6
US__liver,2,1,1,4
"""


def write_lists(folder: Path, names: dict[str, list[str]]) -> None:
    for split, filenames in names.items():
        rows = "".join(f"{filename},label\n" for filename in filenames)
        path = folder / f"RadiologyAI_{split}.csv"
        path.write_text(f"filename,label\n{rows}", encoding="utf-8", errors="surrogateescape")


def filenames_of(split: str) -> list[str]:
    return [
        f"radiology_ai/{folder}/{split}{number}.png"
        for folder, count in zip(FOLDERS.values(), COUNTS[split], strict=True)
        for number in range(count)
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny RadImageNet: 17 images of 3 classes, some of them larger than others, changed long ago."""
    root = tmp_path / "given"
    names = {split: filenames_of(split) for split in COUNTS}
    for number, filename in enumerate(name for of in names.values() for name in of):
        write_image(root / filename, np.random.default_rng(number).integers(0, 256, (8 + number, 9)))
        os.utime(root / filename, (1_500_000_000 + number, 1_500_000_000 + number))
    write_lists(root, names)
    return root


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def contents(root: Path) -> dict[str, bytes]:
    """Relative path -> bytes, of all files of the three splits, hidden ones too."""
    return {
        os.path.relpath(os.path.join(folder, name), root): Path(folder, name).read_bytes()
        for split in COUNTS
        for folder, _, names in os.walk(root / split)
        for name in names
    }


def expected(source: Path) -> dict[str, bytes]:
    return {
        f"{split}/{name}/{Path(filename).name}": (source / filename).read_bytes()
        for split in COUNTS
        for name, folder in FOLDERS.items()
        for filename in filenames_of(split)
        if filename.startswith(f"radiology_ai/{folder}/")
    }


def pack(source: Path, archive: Path, folder: str = ".", lists: str = "first", form: int = tarfile.PAX_FORMAT) -> Path:
    """lists: first, last, or absent."""
    names = sorted(path.name for path in source.iterdir())  # the lists before the images
    if lists == "last":
        names.reverse()
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w", format=form) as tar:
        for name in names:
            if lists != "absent" or not name.endswith(".csv"):
                tar.add(source / name, f"{folder}/{name}")
    return archive


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))[1:]


# The tree


@pytest.mark.parametrize("link", ["symlink", "hardlink", "copy"])
def test_the_tree_has_the_images_and_is_read_by_the_scripts(source, output, link, capsys):
    main(["prepare", "--source", str(source), "--link", link, str(output)])
    assert contents(output) == expected(source)
    assert (output / "summary.csv").read_text() == SUMMARY
    assert rows_of(output / "missing.csv") == rows_of(output / "repeated.csv") == []
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "The lists name 17 images of 3 classes: train 9, val 4, test 4."
    assert printed[2].split() == ["CT__abd__normal", "4", "1", "2", "7"]
    assert printed[5].split() == ["all", "9", "4", "4", "17"]
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


def test_a_cache_takes_links_copies_and_unpacked_images_for_the_same(source, tmp_path):
    prints = set()
    for link in ("symlink", "hardlink", "copy"):
        prepare(tmp_path / link, source, link=link)
        prints.add(fingerprint(ImageFiles.find(tmp_path / link / "train"), {}))
    prepare(tmp_path / "unpacked", archive=pack(source, tmp_path / "images.tar"))
    prints.add(fingerprint(ImageFiles.find(tmp_path / "unpacked" / "train"), {}))
    assert len(prints) == 1
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
        f"{output}/missing.csv: 7 images that the lists name are missing, or their masks"
    )
    printed = capsys.readouterr().out
    assert "warning: 2 classes lack images in a split, where training refuses the set: MR__knee__acl, US__l" in printed
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


# Bad input


def fails(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        main(["prepare", *map(str, arguments)])
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


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
    assert f"{output}/train: " in fails("--source", source, output)
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


# Archives


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz", "images.tgz"])
@pytest.mark.parametrize("folder", [".", "rin2d/of_radiology_ai"])
def test_an_archive_gives_what_the_folder_gives(source, output, tmp_path, name, folder):
    archive = pack(source, tmp_path / name, folder)
    main(["prepare", "--archive", str(archive), str(output)])
    assert contents(output) == expected(source)
    assert (output / "summary.csv").read_text() == SUMMARY
    image = output / "train/US__liver/train1.png"
    assert os.stat(image).st_mtime == os.stat(source / "radiology_ai/US/liver/train1.png").st_mtime


def test_lists_of_an_archive_come_first_or_from_elsewhere(source, output, tmp_path):
    archive = pack(source, tmp_path / "images.tar.gz", lists="last")
    message = fails("--archive", archive, output)
    assert "images.tar.gz: has no RadiologyAI_train.csv before its first image, nor beside it; put Rad" in message
    main(["prepare", "--archive", str(archive), "--csv-dir", str(source), str(output)])
    assert contents(output) == expected(source)
    archive = pack(source, source / "images.tar.gz", lists="absent")  # beside the lists
    main(["prepare", "--archive", str(archive), str(tmp_path / "second")])
    assert contents(tmp_path / "second") == expected(source)


def test_an_archive_lacks_images(source, output, tmp_path):
    (source / "radiology_ai/US/liver/test0.png").unlink()
    archive = pack(source, tmp_path / "images.tar.gz")
    assert "1 images that the lists name are missing" in fails("--archive", archive, output)
    assert rows_of(output / "missing.csv") == [["test", "radiology_ai/US/liver/test0.png"]]


HOSTILE = {
    "above": {"name": "radiology_ai/../../escaped.png"},
    "absolute": {"name": "/radiology_ai/US/liver/val0.png"},
    "symlink": {"name": "radiology_ai/US/liver/val0.png", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "hardlink": {"name": "radiology_ai/US/liver/val0.png", "type": tarfile.LNKTYPE, "linkname": "../../escaped"},
    "device": {"name": "radiology_ai/null", "type": tarfile.CHRTYPE},
    "pipe": {"name": "radiology_ai/pipe", "type": tarfile.FIFOTYPE},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_named_and_nothing_is_made_of_them(source, output, tmp_path, kind):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        member = tarfile.TarInfo()
        for attribute, value in HOSTILE[kind].items():
            setattr(member, attribute, value)
        tar.addfile(member, io.BytesIO())
        tar.add(source / "radiology_ai", "radiology_ai")
    before = {path for path in tmp_path.rglob("*") if output not in path.parents}
    message = fails("--archive", tmp_path / "images.tar", "--csv-dir", source, output)
    assert f"images.tar: its member {HOSTILE[kind]['name']!r} " in message
    assert contents(output) == {}
    assert {path for path in tmp_path.rglob("*") if output not in path.parents} - {output} == before


def test_an_image_twice_in_an_archive_and_strange_times(source, output, tmp_path):
    archive = tmp_path / "images.tar"
    for mtime in ("nan", "-1", "1e300"):
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            for filename in filenames_of("val"):
                member = tar.gettarinfo(source / filename, filename)
                member.pax_headers = {"mtime": mtime}
                tar.addfile(member, io.BytesIO((source / filename).read_bytes()))
        prepare(output, archive=archive, csv_dir=source, allow_missing=True)
        assert os.stat(output / "val/US__liver/val0.png").st_mtime == 0
    with tarfile.open(archive, "a") as tar:
        tar.add(source / filename, filename)
    assert "radiology_ai/US/liver/val0.png: stands twice in the archive" in fails(
        "--archive", archive, "--csv-dir", source, output
    )


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz"])
def test_an_archive_cut_short_anywhere_is_found_out_and_goes_on_when_whole(source, output, tmp_path, name):
    archive = pack(source, tmp_path / name)
    data = archive.read_bytes()
    end = data.rstrip(b"\0") if name.endswith(".tar") else data
    cuts = range(0, len(end), 512 if name.endswith(".tar") else 97)  # every boundary between members, of the first
    for cut in [*cuts, len(end) - 1]:
        archive.write_bytes(data[:cut])
        message = fails("--archive", archive, "--csv-dir", source, output)
        assert f"{name}: is" in message
        assert contents(output).items() <= expected(source).items()
    archive.write_bytes(data)
    prepare(output, archive=archive)
    assert contents(output) == expected(source)


def test_a_damaged_archive_is_found_out(source, output, tmp_path):
    archive = pack(source, tmp_path / "images.tar.gz")
    data = bytearray(archive.read_bytes())
    data[-5] ^= 1  # of gzip's checksum and length
    archive.write_bytes(data)
    assert "images.tar.gz: is no tar archive, damaged or cut short" in fails("--archive", archive, output)
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        archive = pack(source, tmp_path / "images.tar", form=form)
        data = bytearray(archive.read_bytes())
        data[data.index(b"./radiology_ai/MR") + 2] ^= 1  # of a header, whose checksum is wrong then
        archive.write_bytes(data)
        assert "damaged or cut short" in fails("--archive", archive, output)
    archive.write_text("no archive")
    assert "images.tar: is no tar archive" in fails("--archive", archive, "--csv-dir", source, output)


# Correction masks


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def uniform(*colour: int) -> Image.Image:
    return Image.new("RGB", (30, 20), colour)


def filled(dtype: str, *values: float) -> np.ndarray:
    """(224, 224, C) of a constant for each channel."""
    return np.full((224, 224, len(values)), values, dtype=dtype)


@pytest.mark.parametrize(
    ("colour", "mask", "corrected"),
    [
        ((10, 20, 30), filled("uint8", 1, 2, 3), (13, 22, 31)),  # blue, green, red
        ((10, 20, 30), filled("uint8", 250, 250, 250), (4, 14, 24)),  # modulo 256: -6
        ((10, 20, 30), filled("int16", -15, -15, -15), (0, 5, 15)),  # clipped
        ((250, 20, 30), filled("int64", 10), (255, 30, 40)),
        ((10, 20, 30), filled("float32", 0.5, 1.5, 0.25), (10, 22, 30)),  # halves to even: 10.25, 21.5, 30.5
        ((10, 20, 30), filled("float64", -1e300), (0, 0, 0)),
        ((10, 10, 10), np.full((224, 224), 5, "int8"), (15, 15, 15)),
    ],
)
def test_masks_are_added_by_hand(colour, mask, corrected):
    image = correct(uniform(*colour), read_mask(npy(mask), "mask"))
    assert image.size == (224, 224)
    assert image.mode == ("L" if len(set(corrected)) == 1 else "RGB")
    assert (np.asarray(image.convert("RGB")) == corrected).all()


def test_masks_are_added_pixel_by_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224), dtype=np.uint8)
    mask = np.zeros((224, 224), np.uint8)
    mask[3, 200] = 7
    pixels[3, 200] = 251
    found = np.asarray(correct(Image.fromarray(pixels).convert("RGB"), mask))
    assert found[3, 200] == 2  # 258 modulo 256
    found = found.copy()
    found[3, 200] = 251
    assert np.array_equal(found, pixels)


@pytest.mark.parametrize(
    ("shape", "digest"),
    [((256, 256), "db2b9777fafc487f"), ((600, 800), "3ba94e0a4c7f86ad"), ((113, 448), "52d6cc43cd69a4a4")],
)
def test_resizing_has_the_pixels_of_opencv(shape, digest):
    # From cv2.resize(pixels, (224, 224)) of OpenCV 4.10.0 and of 5.0.0.
    pixels = np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert hashlib.sha256(resize(pixels).tobytes()).hexdigest()[:16] == digest


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(1, 700), st.integers(1, 700)))
def test_resizing_is_bilinear_without_antialiasing(shape):
    pixels = np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    exact = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    exact = torch.nn.functional.interpolate(exact, (224, 224), mode="bilinear")[0].permute(1, 2, 0).numpy()
    assert np.abs(resize(pixels) - exact).max() < 1.01  # OpenCV's fixed point cuts off where it shifts


def test_halving_is_the_mean_of_four():
    pixels = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    means = pixels.reshape(224, 2, 224, 2, 3).sum(axis=(1, 3), dtype=int)
    assert np.array_equal(resize(pixels), (means + 2) // 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros((223, 224))), r"holds \(223, 224\); expected an array \(224, 224\)"),
        (npy(np.zeros((3, 224, 224))), "expected an array"),
        (npy(np.zeros((224, 224), bool)), "numbers of the type bool"),
        (npy(np.zeros((224, 224), np.uint16)), "numbers of the type uint16"),
        (npy(np.zeros((224, 224), complex)), "numbers of the type complex128"),
        (npy(np.full((224, 224), np.nan)), "not finite"),
        (npy(np.full((224, 224), -np.inf, np.float16)), "not finite"),
        (npy(np.zeros((224, 224)))[:-1], "cannot be read as an array"),
        (npy(np.zeros((224, 224))).replace(b"(224, 224)", b"(2**9, 1)"), "cannot be read as an array"),
        (npy(np.zeros((224, 224))).replace(b"(224, 224), }  ", b"(10**12,), } "), "cannot be read as an array"),
        (b"", "cannot be read as an array"),
        (b"PK\x03\x04", "cannot be read as an array"),
    ],
)
def test_what_is_no_mask_is_refused(data, message):
    with pytest.raises(UserError, match=f"^mask: .*{message}"):
        read_mask(data, "mask")


def test_masks_are_not_unpickled(tmp_path):
    data = npy(np.array([MakesAFolder(tmp_path / "made")], dtype=object))
    with pytest.raises(UserError, match="mask: cannot be read as an array"):
        read_mask(data, "mask")
    assert not (tmp_path / "made").exists()


@pytest.fixture
def masks(source: Path, tmp_path: Path) -> Path:
    """A folder with masks for the four ultrasound images, and for none of the others."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for number, image in enumerate(sorted((source / "radiology_ai/US/liver").iterdir())):
        mask = np.random.default_rng(number).integers(-9, 10, (224, 224, 3)).astype(np.int16)
        np.save(folder / f"{image.stem}.npy", mask)
    return folder


def pack_masks(masks: Path, archive: Path, name: Callable[[str], str] = lambda name: name) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(masks.iterdir(), reverse=True):
            tar.add(path, name(path.name))
    return archive


def test_corrected_images_are_the_same_on_all_ways(source, masks, output, tmp_path, monkeypatch):
    prepare(output, source, correction_masks=masks)
    found, plain = contents(output), expected(source)
    for name, data in found.items():
        if "US__" in name:
            image = Image.open(source / "radiology_ai/US/liver" / Path(name).name).convert("RGB")
            pixels = resize(np.asarray(image)).astype(int) + np.load(masks / f"{Path(name).stem}.npy")[:, :, ::-1]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels.clip(0, 255))
            assert not (output / name).is_symlink()
        else:
            assert data == plain[name]
            assert (output / name).is_symlink()
    packed = pack_masks(masks, tmp_path / "masks.tar.gz", lambda name: f"correction_masks/{name}")
    flat = pack_masks(masks, tmp_path / "flat.tar.gz")
    archive = pack(source, tmp_path / "images.tar.gz")
    ways = [{"source": source, "correction_masks": path} for path in (masks, packed, flat)]
    ways.append({"archive": archive, "correction_masks": masks})
    for number, arguments in enumerate(ways):
        prepare(tmp_path / str(number), **arguments)
        assert contents(tmp_path / str(number)) == found
        with monkeypatch.context() as patches:
            patches.setattr(radimagenet_images, "write", None)  # a second run writes nothing
            prepare(tmp_path / str(number), **arguments)


@pytest.mark.parametrize("way", ["folder", "archive of masks", "archive of images"])
def test_images_without_a_mask_are_missing(source, masks, output, tmp_path, way):
    (masks / "train1.npy").unlink()
    path = pack_masks(masks, tmp_path / "masks.tar.gz") if way == "archive of masks" else masks
    arguments = {"correction_masks": path, "source": source}
    if way == "archive of images":
        arguments = {"correction_masks": path, "archive": pack(source, tmp_path / "images.tar")}
    with pytest.raises(UserError, match="1 images that the lists name are missing, or their masks"):
        prepare(output, **arguments)
    assert rows_of(output / "missing.csv") == [["train", "radiology_ai/US/liver/train1.png"]]
    assert contents(output).keys() == expected(source).keys() - {"train/US__liver/train1.png"}


def test_a_plain_image_is_not_taken_for_a_corrected_one(source, masks, output):
    prepare(output, source, link="copy")
    assert "is there already, and is not what this run makes of " in fails(
        "--source", source, "--link", "copy", "--correction-masks", masks, output
    )
    (output / "train/US__liver/train1.png").unlink()
    prepare(output.with_name("other"), source)
    (masks / "train1.npy").unlink()
    for image in output.with_name("other").glob("*/US__liver/*"):
        if image.name != "train1.png":
            image.unlink()
    with pytest.raises(UserError, match=r"train1\.png: is there from an earlier run, but has no source or mask now"):
        prepare(output.with_name("other"), source, correction_masks=masks, allow_missing=True)


def test_bad_masks_and_images_are_named(source, masks, output, tmp_path):
    assert "holds no correction mask" in fails("--source", source, "--correction-masks", source, output)
    assert "is no folder and no .tar" in fails("--source", source, "--correction-masks", tmp_path / "no.tar", output)
    packed = pack_masks(masks, tmp_path / "masks.tar.gz")
    archive = pack(source, tmp_path / "images.tar")
    assert "unpack one of the two" in fails("--archive", archive, "--correction-masks", packed, output)
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for folder in ("a", "b"):
            tar.add(masks / "val0.npy", f"{folder}/val0.npy")
    assert "two masks named val0.npy" in fails("--source", source, "--correction-masks", tmp_path / "twice.tar", output)
    (masks / "val0.npy").write_bytes(b"no mask" * 1_000_000)
    assert "val0.npy: cannot be read as an array" in fails(
        "--source", source, "--correction-masks", masks, tmp_path / "new"
    )
    packed = pack_masks(masks, tmp_path / "masks.tar.gz")
    assert "masks.tar.gz: val0.npy: cannot be" in fails(
        "--source", source, "--correction-masks", packed, tmp_path / "new"
    )
    np.save(masks / "val0.npy", np.zeros((224, 224)))
    (source / "radiology_ai/US/liver/val0.png").write_text("no image")
    archive = pack(source, tmp_path / "images.tar")
    for arguments in (("--source", source), ("--archive", archive)):
        message = fails(*arguments, "--correction-masks", masks, tmp_path / arguments[0])
        assert "radiology_ai/US/liver/val0.png: cannot be read as an image (" in message
        assert ".original" not in message
        assert not [name for name in contents(tmp_path / arguments[0]) if name.endswith(".tmp")]


def test_lists_count_images_once():
    lists = ImageLists()
    lists.read("train", io.BytesIO(b"filename\nradiology_ai/US/a/1.png\nradiology_ai/US/a/1.png\n"), "list")
    assert len(lists) == 1
    assert lists.listed("US__a") == {"1.png"}
    assert lists.repeated() == {"radiology_ai/US/a/1.png": ["train", "train"]}
