"""Folders of data as users have them: hidden entries, other layouts and extensions, lists in other encodings."""

import os
import pickle
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from torchvision.datasets.folder import IMG_EXTENSIONS

from experiments.plan import Subset
from experiments.subsets import link_subset
from tests.conftest import write_image_folder
from tests.helpers.caches import TEST_TRAIN, splits
from utils import predict
from utils.data.folders import LAYOUT, ImageFiles, check_same_classes, find_classes, read_excluded
from utils.data.listing import IMAGE_ENDINGS, is_hidden
from utils.inference.classifier import read_class_names
from utils.runtime.errors import UserError
from utils.runtime.text import decode_text, explain_forms, list_names

NFC, NFD = (unicodedata.normalize(form, "Schädel") for form in ("NFC", "NFD"))


def touch(root: Path, *names: str) -> Path:
    """Empty files at root/<name>."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def paths_of(files: ImageFiles) -> list[str]:
    return [files.path_as_text(index) for index in range(len(files))]


def open_error(data: Path, *flags: object) -> str:
    """The error of a training on this folder."""
    with pytest.raises(UserError) as caught:
        splits(data, *flags)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# Hidden files and folders


def test_names_that_systems_leave_are_hidden_and_no_others():
    assert all(map(is_hidden, [".DS_Store", "._a.png", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "Thumbs.db"]))
    assert not any(map(is_hidden, ["a", "_a", "a.png", "macosx", "eaDir", "#2.png", "thumbs", "@home"]))


def test_the_endings_of_images_are_those_of_torchvision():
    assert IMAGE_ENDINGS == IMG_EXTENSIONS


def test_hidden_entries_are_no_class_and_no_image_and_are_counted(tmp_path):
    root = touch(tmp_path / ".cache" / "train", "a/1.png", "a/._1.png", "a/@eaDir/1.png/thumb.jpg", "b/2.png", ".hid")
    touch(root, ".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/a/._1.png", "b/.DS_Store")
    files = ImageFiles.find(root)
    assert files.classes == ["a", "b"]
    assert paths_of(files) == ["a/1.png", "b/2.png"]
    assert files.passed_over.hidden == 6
    assert files.describe() == "train: 2 images in 2 classes; skipped: 6 hidden files or folders"
    assert find_classes(root) == read_class_names(root) == ["a", "b"]


def test_predict_skips_hidden_entries_unless_they_are_named(tmp_path, capsys):
    root = touch(tmp_path / ".data", "a/1.png", "a/.ipynb_checkpoints/2.png", "__MACOSX/._1.png", "._3.png", "b.dcm")
    assert predict.find_all([str(root)]) == [str(root / "a" / "1.png")]
    assert capsys.readouterr().err == "1 images; skipped: 3 hidden files or folders; ignored: 1 .dcm\n"
    assert predict.find_all([str(root / "._3.png")]) == [str(root / "._3.png")]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"only: no image .* \(ignored: 2 \.dcm\)"):
        predict.find_all([str(touch(tmp_path / "only", "1.dcm", "2.dcm"))])


def test_subsets_hold_no_hidden_images_and_may_lack_a_test_class(tmp_path):
    for split in ("train", "val", "test"):
        touch(tmp_path / "data" / split, "a/1.png", "a/._1.png", "b/1.png", ".ipynb_checkpoints/1.png")
    (tmp_path / "data" / "test" / "b" / "1.png").unlink()
    link_subset(tmp_path / "data", Subset(), tmp_path / "subset")
    paths = sorted(str(path.relative_to(tmp_path / "subset")) for path in (tmp_path / "subset").rglob("*.png"))
    assert paths == ["test/a/1.png", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"]


def test_a_run_prints_the_content_of_each_split_once(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", images=8)
    touch(data, "train/.ipynb_checkpoints/x.png", "val/dark/x.dcm", "val/dark/1.2.840.113", "test/x.png", "test/dark/y")
    splits(data)
    expected = [
        "train: 24 images in 3 classes; skipped: 1 hidden file or folder",
        "val: 15 images in 3 classes; ignored: 1 .dcm, 1 without an ending",
        "test: 9 images in 3 classes; ignored: 1 without an ending, 1 image in no class folder",
    ]
    assert capsys.readouterr().out.splitlines() == expected
    splits(data, *TEST_TRAIN)
    assert capsys.readouterr().out.splitlines() == expected[:1]


# Other extensions


def test_ignored_files_are_counted_by_extension(tmp_path):
    endings = ("dcm", "DCM", "gif", "nii", "gz", "npy", "jp2", "json", "jpg_")
    names = [f"a/{number}.{ending}" for number, ending in enumerate(endings)]
    touch(tmp_path, *names, "a/1.JPEG", "a/2.Tif", "a/README", "a/1.2.840.10008.5", "b/1.png", "b/deep/2.npy", "l.csv")
    files = ImageFiles.find(tmp_path)
    assert paths_of(files) == ["a/1.JPEG", "a/2.Tif", "b/1.png"]
    assert files.passed_over.describe() == (
        "ignored: 2 .dcm, 2 .npy, 2 without an ending, 1 .csv, 1 .gif, 1 .gz, 1 .jp2, 1 .jpg_, 2 of other endings"
    )
    assert files.mostly_ignored == ["a"]
    assert files.describe_ignored().startswith(
        f"{tmp_path.name}/a: more files are ignored than read; convert them to one of .jpg, "
    )


def test_a_run_warns_of_classes_with_more_ignored_files_than_images(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", images=4)
    touch(data / "train" / "dark", *(f"{number}.jp2" for number in range(4)))
    splits(data)  # as many of both
    assert "warning" not in capsys.readouterr().out
    touch(data / "train" / "dark", "4.jp2")
    splits(data)
    assert (
        "warning: train/dark: more files are ignored than read; convert them to one of .jpg" in capsys.readouterr().out
    )


# Layouts


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["stray.png"], r": holds no class folders \(ignored: 1 image in no class folder\); expected DATA"),
        ([".ipynb_checkpoints/1.png"], r": holds no class folders \(skipped: 1 hidden file or folder\); expected DATA"),
        (["a/1.png", "b/deep/x.txt", "b/y"], r"/b: holds no image .*\(ignored: 1 \.txt, 1 without an ending\)"),
        (["a/1.png", "a/patient 1/2.png", "b/1.png"], r"class folders \(1\): a/patient 1\. "),
        (
            [f"{kind}/{part}/{name}/1.png" for kind in ("CT", "MR") for part in ("abd", "knee") for name in "abc"],
            r"class folders \(12\): CT/abd/a, .*, CT/knee/b and 7 more\. .*; move them up",
        ),
    ],
)
def test_a_split_of_another_layout_is_refused(names, error, tmp_path):
    root = touch(tmp_path / "train", *names)
    with pytest.raises(UserError, match=f"^{re.escape(str(root))}.*{error}"):
        ImageFiles.find(root)


def test_images_one_folder_too_deep_are_refused_with_advice(tmp_path):
    data = write_image_folder(tmp_path / "data", images=4)
    for split in ("train", "val", "test"):
        shutil.move(data / split, data / "moved")
        shutil.move(data / "moved", data / split / "images")
    assert open_error(data) == (
        f"{data}/val: images are in folders below class folders (3): images/bright, images/dark, images/striped. "
        f"Expected them directly in the class folders, as {LAYOUT}; "
        f"move the content of {data}/val/images up into {data}/val."
    )


def test_a_single_class_is_refused(tmp_path):
    message = open_error(write_image_folder(tmp_path / "data", ("images",), images=4), "--num-classes", 1)
    assert "data/train: its only class folder is images, and a classifier needs two classes or more" in message
    assert f"expected {LAYOUT}" in message


def test_broken_links_and_links_to_another_class_are_refused(tmp_path):
    root = touch(tmp_path / "train", "a/1.png", "c/1.png")
    (root / "b").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="train/b: broken link; restore its target, or remove the link"):
        ImageFiles.find(root)
    (root / "b").unlink()
    (root / "b").symlink_to("a")
    with pytest.raises(UserError, match=r"train/b: a link makes this the same folder as .*train/a; remove the link"):
        ImageFiles.find(root)
    (root / "b").unlink()
    (root / "b").symlink_to(touch(tmp_path / "elsewhere", "1.png"))
    assert paths_of(ImageFiles.find(root)) == ["a/1.png", "b/1.png", "c/1.png"]


def test_a_data_path_of_another_level_gets_a_suggestion(tmp_path):
    data = write_image_folder(tmp_path / "sets" / "mini", images=4)
    assert f"{data}/train holds the folders bright, dark, striped. Did you mean {data}?" in open_error(data / "train")
    assert f"{data}/train/dark holds no folders. Did you mean {data}?" in open_error(data / "train" / "dark")
    assert f"{data.parent} holds the folders mini. Did you mean {data}?" in open_error(data.parent)
    (data / "val").rename(data / "Validation")
    message = open_error(data)
    assert message.startswith(f"{data}/val: no such folder; expected {LAYOUT}.")
    assert message.endswith(f" {data} holds the folders Validation, test, train.")


# Classes of several splits


def test_a_class_in_one_split_only_is_named(tmp_path):
    check_same_classes(tmp_path, {"train": ["a", "b"], "val": ["a", "b"], "test": ["a", "b"]})
    with pytest.raises(UserError, match=r"train/c: .* in 'train' but not in 'val' \(also: d\); every split must hold"):
        check_same_classes(tmp_path, {"train": ["a", "c", "d"], "val": ["a"]})
    with pytest.raises(UserError, match=r"test/b: .* in 'test' but not in 'train'; every split must hold"):
        check_same_classes(tmp_path, {"train": ["a"], "val": ["a"], "test": ["a", "b"]})


def test_a_split_is_numbered_by_the_classes_of_the_training(tmp_path):
    root = touch(tmp_path / "test", "c/1.png", "a/1.png", "a/2.png", "b/notes.txt")
    files = ImageFiles.find(root, classes=["a", "b", "c", "d"])
    assert files.classes == ["a", "b", "c", "d"]
    assert files.targets.tolist() == [0, 0, 2]
    assert paths_of(files) == ["a/1.png", "a/2.png", "c/1.png"]
    assert files.empty_classes() == ["b", "d"]
    assert files.describe() == "test: 3 images in 2 classes; ignored: 1 .txt"
    files = ImageFiles.find(root, {"c/1.png"}, classes=["a", "b", "c"])
    assert files.empty_classes() == ["b", "c"]
    with pytest.raises(UserError, match=r"test/a: this class is in 'test' but not in 'train'; .* b, c"):
        ImageFiles.find(root, classes=["b", "c"])
    with pytest.raises(UserError, match=r"test: no class has an image that --exclude leaves"):
        ImageFiles.find(root, {"c/1.png", "a/1.png", "a/2.png"}, classes=["a", "b", "c"])
    with pytest.raises(UserError, match=r"hollow: no class has an image\."):
        ImageFiles.find(touch(tmp_path / "hollow", "a/notes.txt"), classes=["a", "b"])


# Lists, encodings and Unicode forms


def test_a_list_excludes_images_of_any_names(tmp_path):
    odd = os.fsdecode(b"a/caf\xe9 1.png")
    root = touch(tmp_path / "train", odd, "a/#2.png", "a/3.png", "b/4.png")
    listed = tmp_path / "list.txt"
    listed.write_bytes(
        b"# twins\n  train/a/caf\xe9 1.png \r\ntrain/a/#2.png\ntrain/b/absent.png\nval/b/4.png\nelse\n\n"
    )
    excluded = read_excluded(listed)
    assert excluded == {"train": {odd, "a/#2.png", "b/absent.png"}, "val": {"b/4.png"}, "test": set(), "": {"else"}}
    files = ImageFiles.find(root, excluded["train"])
    assert paths_of(files) == ["a/3.png", "b/4.png"]
    assert files.targets.tolist() == [0, 1]
    assert files.excluded == 2
    with pytest.raises(UserError, match=f"^{root}/b: --exclude leaves this class no image"):
        ImageFiles.find(root, {"b/4.png"})
    with pytest.raises(UserError, match=r"--exclude .*train: cannot be read \(Is a directory\)"):
        read_excluded(root)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lists_are_read_with_and_without_a_byte_order_mark(encoding, tmp_path):
    text = f"train/{NFC}/1.png\r\n# why\r\ntrain/b/2.png\r\n"
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    assert read_excluded(tmp_path / "list.txt")["train"] == {f"{NFC}/1.png", "b/2.png"}
    (tmp_path / "names.txt").write_bytes(f"{NFC}\r\nb\r\n".encode(encoding))
    assert read_class_names(tmp_path / "names.txt") == [NFC, "b"]


def test_a_list_in_an_unknown_encoding_is_refused(tmp_path):
    for name, data in (("no mark", "train/a/1.png\n".encode("utf-16-le")), ("cut", b"\xff\xfea")):
        (tmp_path / name).write_bytes(data)
        for read, flag in ((read_excluded, "--exclude"), (read_class_names, "--classes")):
            with pytest.raises(UserError, match=f"{flag} .*{name}: cannot be read") as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)
    assert decode_text(b"caf\xe9") == "caf\udce9"


def test_a_list_names_images_in_either_unicode_form(tmp_path):
    root = touch(tmp_path / "train", f"{NFD}/{NFD}.png", f"{NFD}/2.png", "b/1.png", f"b/{NFC}.png", f"b/{NFD}.png")
    files = ImageFiles.find(root, {f"{NFC}/{NFC}.png", f"b/{NFC}.png", "b/absent.png"})
    assert paths_of(files) == [f"{NFD}/2.png", "b/1.png", f"b/{NFD}.png"]
    assert files.excluded == 2


def test_class_names_that_differ_in_their_unicode_form_are_explained(tmp_path):
    apart = r"'Sch\\xe4del' and 'Scha\\u0308del' look the same but differ in their Unicode form .*convmv --nfc"
    swapped = r"'Scha\\u0308del' and 'Sch\\xe4del' look the same"
    with pytest.raises(UserError, match=apart):
        check_same_classes(tmp_path, {"train": ["a", NFC], "val": ["a", NFD]})
    with pytest.raises(UserError, match=f"holds two folders of one class. {swapped}|{apart}"):
        find_classes(touch(tmp_path / "both", f"{NFC}/1.png", f"{NFD}/1.png"))
    with pytest.raises(UserError, match=f"not in 'train'; .*{swapped}"):
        ImageFiles.find(touch(tmp_path / "test", f"{NFD}/1.png", "a/1.png"), classes=["a", NFC])
    assert explain_forms(["a", NFC], [NFC, "b"]) == ""


def test_names_in_messages_are_short_and_printable():
    assert list_names(["a\n", "b" * 80, "c", "d"], 3) == f"a\\n, {'b' * 57}..., c and 1 more"


def test_file_names_take_few_bytes_beyond_their_length():
    names = {f"class {number}": [f"{index:08d}.png" for index in range(1000)] for number in range(10)}
    files = ImageFiles(Path("/data/train"), names)
    assert files.path(1002) == Path("/data/train/class 1/00000002.png")
    assert files.path(0) == Path("/data/train/class 0/00000000.png")
    assert len(pickle.dumps(files)) < 10_000 * (len("00000000.png") + 4 + 8) + 2000
