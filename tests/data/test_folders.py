"""Folders of data as people have them: hidden leftovers, other layouts, other endings, lists of other encodings."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from _normal import train as normal
from benchmarks.images import png_files
from experiments.plan import Subset
from experiments.subsets import link_subset
from tests.conftest import SMALL, write_image, write_image_folder
from utils import predict
from utils.data.folders import ImageFiles, check_same_classes, find_classes, list_images, read_excluded
from utils.data.listing import PassedOver, find_images, is_hidden
from utils.inference.classifier import read_class_names
from utils.runtime.errors import UserError
from utils.runtime.text import decode_text, explain_forms, list_names

NFC, NFD = (unicodedata.normalize(form, "Schädel") for form in ("NFC", "NFD"))


def touch(root: Path, *names: str) -> Path:
    """Empty files at root/<name>, without their bytes being looked at."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def paths_of(files: ImageFiles) -> list[str]:
    return [files.path_as_text(index) for index in range(len(files))]


def open_error(*flags: object) -> str:
    """The error of a training with these flags."""
    with pytest.raises(UserError) as caught:
        normal.main([*SMALL, *map(str, flags)])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# Hidden files and folders


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", ".DS_Store", "._a.png", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "Thumbs.db"],
)
def test_names_that_systems_leave_are_hidden(name):
    assert is_hidden(name)


@pytest.mark.parametrize("name", ["a", "_a", "a.png", "macosx", "eaDir", "#2.png", "thumbs", "@home"])
def test_other_names_are_not_hidden(name):
    assert not is_hidden(name)


def test_hidden_entries_are_no_class_and_no_image_and_are_counted(tmp_path):
    root = touch(tmp_path / ".cache" / "train", "a/1.png", "a/._1.png", "a/@eaDir/1.png/thumb.jpg", "b/2.png", ".hid")
    touch(root, ".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/a/._1.png", "b/.DS_Store")
    files = ImageFiles.find(root)
    assert files.classes == ["a", "b"]
    assert paths_of(files) == ["a/1.png", "b/2.png"]
    assert files.passed_over.hidden == 6
    assert files.describe() == "train: 2 images in 2 classes; skipped: 6 hidden files or folders"
    assert find_classes(root) == read_class_names(root) == ["a", "b"]
    assert list_images(root / "a") == [str(root / "a" / "1.png")]


def test_a_class_of_hidden_images_only_has_none(tmp_path):
    touch(tmp_path, "a/1.png", "b/._1.png")
    with pytest.raises(UserError, match=r"/b: holds no image .*\(skipped: 1 hidden file or folder\); expected DATA"):
        ImageFiles.find(tmp_path)
    with pytest.raises(UserError, match=r"holds no class folders \(skipped: 1 hidden file or folder\); expected DATA"):
        find_classes(touch(tmp_path / "only", ".ipynb_checkpoints/1.png"))


def test_predict_skips_hidden_entries_below_a_folder_but_not_what_is_named(tmp_path, capsys):
    root = touch(tmp_path / ".data", "a/1.png", "a/.ipynb_checkpoints/2.png", "__MACOSX/._1.png", "._3.png", "b.dcm")
    assert predict.find_all([str(root)]) == [str(root / "a" / "1.png")]
    assert capsys.readouterr().err == "1 images; skipped: 3 hidden files or folders; ignored: 1 .dcm\n"
    assert predict.find_all([str(root / "._3.png")]) == [str(root / "._3.png")]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"only: no image .* \(ignored: 2 \.dcm\)"):
        predict.find_all([str(touch(tmp_path / "only", "1.dcm", "2.dcm"))])


def test_subsets_hold_no_hidden_images_and_cope_with_an_empty_test_class(tmp_path):
    for split in ("train", "val", "test"):
        touch(tmp_path / "data" / split, "a/1.png", "a/._1.png", "b/1.png", ".ipynb_checkpoints/1.png")
    (tmp_path / "data" / "test" / "b" / "1.png").unlink()
    link_subset(tmp_path / "data", Subset(), tmp_path / "subset")
    found = sorted(str(path.relative_to(tmp_path / "subset")) for path in (tmp_path / "subset").rglob("*.png"))
    assert found == ["test/a/1.png", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"]


def test_benchmarks_take_no_hidden_images(tmp_path):
    class Made:
        work, data, size = tmp_path, None, 32

    touch(tmp_path / "png", "0.png", "._0.png", ".DS_Store")
    assert png_files(Made, 5) == [tmp_path / "png" / "0.png"]


def test_a_training_says_once_what_each_split_holds(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", images=8)
    touch(data, "train/.ipynb_checkpoints/x.png", "val/dark/x.dcm", "val/dark/1.2.840.113", "test/x.png", "test/dark/y")
    flags = [*SMALL, "--data-path", str(data), "--output-dir", str(tmp_path / "run")]
    normal.main([*flags, "--epochs", "1"])
    lines = capsys.readouterr().out.splitlines()
    expected = [
        "train: 24 images in 3 classes; skipped: 1 hidden file or folder",
        "val: 15 images in 3 classes; ignored: 1 .dcm, 1 without an ending",
        "test: 9 images in 3 classes; ignored: 1 without an ending, 1 image in no class folder",
    ]
    assert [line for line in lines if line.startswith(("train: ", "val: ", "test: "))] == expected
    normal.main([*flags, "--test-only", "--resume", str(tmp_path / "run" / "checkpoint.pth")])
    assert expected[1] in capsys.readouterr().out.splitlines()


# Files of other endings


def test_ignored_files_are_counted_by_ending(tmp_path):
    endings = ("dcm", "DCM", "gif", "nii", "gz", "npy", "jp2", "json", "jpg_")
    names = [f"a/{number}.{ending}" for number, ending in enumerate(endings)]
    touch(tmp_path, *names, "a/1.JPEG", "a/2.Tif", "a/README", "a/1.2.840.10008.5", "b/1.png", "b/deep/2.npy", "l.csv")
    files = ImageFiles.find(tmp_path)
    assert paths_of(files) == ["a/1.JPEG", "a/2.Tif", "b/1.png"]
    assert files.passed_over.endings == {
        **{".dcm": 2, ".gif": 1, ".nii": 1, ".gz": 1, ".npy": 2, ".jp2": 1, ".json": 1, ".jpg_": 1, "": 2},
        ".csv": 1,
    }
    assert files.passed_over.describe() == (
        "ignored: 2 .dcm, 2 .npy, 2 without an ending, 1 .csv, 1 .gif, 1 .gz, 1 .jp2, 1 .jpg_, 2 of other endings"
    )
    assert files.mostly_ignored == ["a"]
    assert files.describe_ignored().startswith(f"{tmp_path.name}/a: more files are ignored than read. Only .jpg, ")


def test_as_many_files_beside_the_images_are_no_reason_to_warn(tmp_path):
    files = ImageFiles.find(touch(tmp_path, "a/1.png", "a/1.json", "b/1.png"))
    assert (files.mostly_ignored, files.describe_ignored()) == ([], "")


def test_a_training_warns_where_most_files_of_a_class_are_ignored(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", images=8)
    for number in range(7):
        (data / "train" / "dark" / f"{number}.png").rename(data / "train" / "dark" / f"{number}.jp2")
    normal.main([*SMALL, "--data-path", str(data), "--output-dir", str(tmp_path / "run"), "--epochs", "1"])
    said = capsys.readouterr().out
    assert "train: 17 images in 3 classes; ignored: 7 .jp2\n" in said
    assert "warning: train/dark: more files are ignored than read. Only .jpg" in said


# Layouts


def test_images_one_folder_too_deep_are_refused_with_the_folders(tmp_path):
    data = write_image_folder(tmp_path / "data", images=4)
    for split in ("train", "val", "test"):
        shutil.move(data / split, data / "moved")
        shutil.move(data / "moved", data / split / "images")
    message = open_error("--data-path", data, "--output-dir", tmp_path / "run")
    assert message == (
        f"{data}/val: images lie in folders below class folders (3): images/bright, images/dark, images/striped. "
        "Expected them directly in the class folders, as DATA/{train,val,test}/<class>/<image>; "
        f"move what is in {data}/val/images up into {data}/val."
    )


def test_images_below_class_folders_are_refused(tmp_path):
    names = [f"{of}/{place}/{label}/1.png" for of in ("CT", "MR") for place in ("abd", "knee") for label in "abc"]
    with pytest.raises(UserError, match=r"class folders \(12\): CT/abd/a, .*, CT/knee/b and 7 more\. .*; move them up"):
        ImageFiles.find(touch(tmp_path / "radimagenet", *names))
    with pytest.raises(UserError, match=r"class folders \(1\): a/patient 1\. "):
        ImageFiles.find(touch(tmp_path / "patients", "a/1.png", "a/patient 1/2.png", "b/1.png"))
    with pytest.raises(UserError, match=r"class folders \(1\): a/patient 1\. "):
        list_images(tmp_path / "patients" / "a")
    files = ImageFiles.find(touch(tmp_path / "masks", "a/1.png", "a/masks/1.npy", "b/1.png"))
    assert paths_of(files) == ["a/1.png", "b/1.png"]


@pytest.mark.parametrize("flags", [(), ("--num-classes", 1)])
def test_a_single_class_is_refused(flags, tmp_path):
    data = write_image_folder(tmp_path / "data", ("images",), images=12)
    message = open_error("--data-path", data, "--output-dir", tmp_path / "run", *flags)
    assert "data/train: its only class folder is images, and a classifier needs two classes or more" in message
    assert "expected DATA/{train,val,test}/<class>/<image>" in message


def test_a_link_to_nowhere_is_no_missing_class(tmp_path):
    root = touch(tmp_path / "train", "a/1.png", "b/1.png")
    (root / "c").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="train/c: this link leads nowhere; restore what it led to, or remove it"):
        ImageFiles.find(root)


def test_one_folder_under_two_class_names_is_refused(tmp_path):
    root = touch(tmp_path / "train", "a/1.png", "c/1.png")
    (root / "b").symlink_to("a")
    with pytest.raises(UserError, match=r"train/b: a link makes this the same folder as .*train/a; remove the link"):
        ImageFiles.find(root)
    (root / "b").unlink()
    (root / "b").symlink_to(touch(tmp_path / "elsewhere", "1.png"))
    assert paths_of(ImageFiles.find(root)) == ["a/1.png", "b/1.png", "c/1.png"]


def test_a_data_path_of_another_level_shows_what_is_there(tmp_path):
    data = write_image_folder(tmp_path / "sets" / "mini", images=4)
    too_deep = open_error("--data-path", data / "train", "--output-dir", tmp_path / "run")
    assert f"{data}/train holds the folders bright, dark, striped. Did you mean {data}?" in too_deep
    deeper = open_error("--data-path", data / "train" / "dark", "--output-dir", tmp_path / "run")
    assert f"{data}/train/dark holds no folders. Did you mean {data}?" in deeper
    too_high = open_error("--data-path", data.parent, "--output-dir", tmp_path / "run")
    assert f"{data.parent} holds the folders mini. Did you mean {data}?" in too_high
    (data / "val").rename(data / "Validation")
    message = open_error("--data-path", data, "--output-dir", tmp_path / "run")
    assert message.startswith(f"{data}/val: no such folder; expected DATA/")
    assert message.endswith(f" {data} holds the folders Validation, test, train.")


# Encodings and Unicode forms


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lists_are_read_with_and_without_a_byte_order_mark(encoding, tmp_path):
    text = f"train/{NFC}/1.png\r\n# why\r\ntrain/b/2.png\r\n"
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    assert read_excluded(tmp_path / "list.txt")["train"] == {f"{NFC}/1.png", "b/2.png"}
    (tmp_path / "names.txt").write_bytes(f"{NFC}\r\nb\r\n".encode(encoding))
    assert read_class_names(tmp_path / "names.txt") == [NFC, "b"]


def test_text_in_an_unknown_encoding_is_one_sentence(tmp_path):
    for name, data in (("no mark", "train/a/1.png\n".encode("utf-16-le")), ("cut", b"\xff\xfea")):
        (tmp_path / name).write_bytes(data)
        for read, flag in ((read_excluded, "--exclude"), (read_class_names, "--classes")):
            with pytest.raises(UserError, match=f"{flag} .*{name}: cannot be read") as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)
    assert decode_text(b"caf\xe9") == "caf\udce9"


def test_a_line_of_a_list_names_an_image_in_either_unicode_form(tmp_path):
    root = touch(tmp_path / "train", f"{NFD}/{NFD}.png", f"{NFD}/2.png", "b/1.png", f"b/{NFC}.png", f"b/{NFD}.png")
    files = ImageFiles.find(root, {f"{NFC}/{NFC}.png", f"b/{NFC}.png", "b/absent.png"})
    assert paths_of(files) == [f"{NFD}/2.png", "b/1.png", f"b/{NFD}.png"]
    assert files.excluded == 2


def test_class_names_that_differ_in_their_unicode_form_are_shown_apart(tmp_path):
    apart = r"'Sch\\xe4del' and 'Scha\\u0308del' look the same but differ in their Unicode form .*convmv --nfc"
    swapped = r"'Scha\\u0308del' and 'Sch\\xe4del' look the same"
    with pytest.raises(UserError, match=apart):
        check_same_classes(tmp_path, {"train": ["a", NFC], "val": ["a", NFD]})
    with pytest.raises(UserError, match=f"holds two folders of one class. {swapped}|{apart}"):
        find_classes(touch(tmp_path / "both", f"{NFC}/1.png", f"{NFD}/1.png"))
    with pytest.raises(UserError, match=f"not in 'train' .*{swapped}"):
        ImageFiles.find(touch(tmp_path / "test", f"{NFD}/1.png", "a/1.png"), classes=["a", NFC])
    assert explain_forms(["a", NFC], [NFC, "b"]) == ""


def test_names_in_messages_are_short_and_printable():
    assert list_names(["a\n", "b" * 80, "c", "d"], 3) == f"a\\n, {'b' * 57}..., c and 1 more"
    assert list_names(["a"]) == "a"


# The classes of the training


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
    with pytest.raises(
        UserError, match=r"test/a: this class is in 'test' but not in 'train' \(1 such in all\); .* b, c"
    ):
        ImageFiles.find(root, classes=["b", "c"])
    with pytest.raises(UserError, match=r"test: no class has an image that --exclude leaves"):
        ImageFiles.find(root, {"c/1.png", "a/1.png", "a/2.png"}, classes=["a", "b", "c"])
    with pytest.raises(UserError, match=r"hollow: no class has an image\."):
        ImageFiles.find(touch(tmp_path / "hollow", "a/notes.txt"), classes=["a", "b"])


def test_images_below_a_folder_are_found_at_any_depth(tmp_path):
    write_image(tmp_path / "a" / "b" / "1.png", np.zeros((4, 4)))
    passed_over = PassedOver()
    assert find_images(touch(tmp_path, "a/.x/2.png", "a/b/c.txt"), passed_over) == [str(tmp_path / "a" / "b" / "1.png")]
    assert (passed_over.hidden, passed_over.endings) == (1, {".txt": 1})
