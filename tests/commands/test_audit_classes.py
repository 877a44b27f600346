"""What the audit's list must not do: leave a class without images, or take out an image for a hidden copy of it."""

import unicodedata

import numpy as np

from tests.conftest import write_image
from tests.helpers.audits import LEAK, census_of, left_out, picture, put, run
from utils.audit import __main__ as audit
from utils.audit import outputs
from utils.audit.report import sections
from utils.data.folders import ImageFiles, read_excluded


def test_no_class_of_a_split_is_left_without_images(tmp_path):
    images = {"test/a/0.png": (0, 0), "val/a/0.png": (0, 0), "train/a/0.png": (1, 1), "train/a/1.png": (2, 2)}
    images |= {"train/b/0.png": (3, 100), "train/c/0.png": (3, 100), "train/c/1.png": (3, 100)}
    images |= {"val/b/0.png": (4, 150), "train/b/1.png": (4, 150), "test/b/0.png": (5, 200)}
    images |= {"train/d/0.png": (7, 151), "train/d/1.png": (6, 230)}
    census = census_of(tmp_path, images)
    assert left_out(census) == {"train/d/0.png": LEAK}
    assert census.kept_classes(readable=True) == [
        *("train/a (2 images)", "train/b (2 images)", "train/c (2 images)", "val/a (1 image)")
    ]
    assert census.kept_classes(readable=False) == []
    said = "Kept against the rule, which would leave these classes no image that can be read: train/a (2 images), "
    assert said in " ".join(next(part for part in sections(census, "") if part.title == "What to leave out").sentences)
    listed = outputs.exclude_list(census, "").decode()
    assert said in listed.replace("\n# ", " ")
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
    run(tmp_path / "data", tmp_path)
    assert read_excluded(tmp_path / "list")["train"] == {"a/1.png"}
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "Not listed, though no image of these classes can be read: train/c (2 images); replace" in text


def test_hidden_copies_take_no_image_out(tmp_path):
    data = tmp_path / "data"
    for seed, name in enumerate(("train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png", "test/b/0.png")):
        put(data / name, picture(seed))
        put(data / name.split("/")[0] / ".ipynb_checkpoints" / f"{seed}.png", picture(seed))
    (data / "train" / "a" / "._0.png").write_bytes(b"\0\5\26\7")
    (data / "train" / "a" / "0.dcm").touch()
    (data / "train" / "a" / "1.dcm").touch()
    (data / "test" / "a").mkdir()
    run(data, tmp_path)
    assert not any(read_excluded(tmp_path / "list").values())
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "train: skipped: 2 hidden files or folders; ignored: 2 .dcm.\n" in text
    assert "Warning: train/a: more files are ignored than read." in text
    assert "test lacks 1 classes that other splits have: a.\n" in text
    assert "  test        1        1           0      0\n" in text


def test_classes_that_differ_in_their_unicode_form_are_explained(tmp_path, capsys):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        for name in ("a", unicodedata.normalize(form, "Schädel")):
            write_image(tmp_path / "data" / split / name / "1.png", np.eye(8) * 255)
    audit.main([str(tmp_path / "data"), "-o", str(tmp_path / "audit"), "-j", "0"])
    assert r"'Scha\u0308del' and 'Sch\xe4del' look the same but differ in their Unicode form" in capsys.readouterr().out


def test_a_single_class_is_reported(tmp_path):
    put(tmp_path / "data" / "a" / "0.png", picture(0))
    audit.main([str(tmp_path / "data"), "-o", str(tmp_path / "out"), "-j", "0"])
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "A single class, a: the training refuses this set. Expected DATA/{train,val,test}/<class>/<image>.\n" in text
