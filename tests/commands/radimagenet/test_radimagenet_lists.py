"""RadImageNet's lists, and hidden files in lists, source, archive and tree."""

import io
import os
import tarfile

import pytest

from tests.helpers.radimagenet import COUNTS, contents, expected, fails, filenames_of, pack, write_lists
from utils.data.folders import ImageFiles
from utils.radimagenet.__main__ import prepare


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_other_columns_and_a_byte_order_mark_do_not_matter(source, output, encoding):
    for split in COUNTS:
        rows = "".join(f'7,"a ""label""",{name}\r\n' for name in filenames_of(split))
        (source / f"RadiologyAI_{split}.csv").write_bytes(f",label,filename\r\n{rows}\r\n".encode(encoding))
    prepare(output, source)
    assert contents(output) == expected(source)


BAD_FOLDERS = (
    *("elsewhere/US/liver", "/radiology_ai/US/liver", "../radiology_ai/US/liver", "radiology_ai", ""),
    *("radiology_ai/XR/chest/normal", "radiology_ai/CT/abd", "radiology_ai/US/liver/deep"),
    *("radiology_ai/CT/../normal", "radiology_ai/US/..", "radiology_ai/CT//normal", "radiology_ai/US/."),
    "radiology_ai\\US\\liver",
)
NO_COLUMN = "RadiologyAI_val.csv: its first line has no column 'filename'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", NO_COLUMN),
        ("file,label\nradiology_ai/US/liver/a.png,x\n", NO_COLUMN),
        ("\x89PNG\r\n\x1a\n\0\0", NO_COLUMN),
        ("filename,label\n", "RadiologyAI_val.csv: names no image"),
        ("label,filename\nx,radiology_ai/US/a/a.png\nx\n", "RadiologyAI_val.csv, line 3: has no column 'filename'"),
        ("filename\n" + "a" * 200_000, "RadiologyAI_val.csv, line 2: unreadable (field larger than"),
        ("filename\nradiology_ai/US/liver/a.txt\n", "line 2: 'radiology_ai/US/liver/a.txt' is not an image; expected"),
        ("filename\nradiology_ai/US/liver/a\0.png\n", "is not an image"),
        ("filename\nradiology_ai/CT/a__b/c/a.png\nradiology_ai/CT/a/b__c/a.png\n", "both become the class CT__a__b__c"),
        *((f"filename\n{folder}/a.png\n", f"line 2: the folder {folder!r} does not fit") for folder in BAD_FOLDERS),
    ],
)
def test_bad_lists_are_refused_before_anything_is_made(source, output, text, message):
    (source / "RadiologyAI_val.csv").write_text(text)
    assert message in fails("--source", source, output)
    assert not output.exists()


# Hidden files


def test_hidden_files_of_source_and_tree_are_skipped_and_counted(source, output, capsys):
    (source / "radiology_ai/US/liver/._train0.png").write_bytes(b"no image")
    (source / "radiology_ai/US/liver/.ipynb_checkpoints").mkdir()
    prepare(output, source)
    assert contents(output) == expected(source)
    assert "Hidden files or folders skipped in the source and in" in capsys.readouterr().out
    (output / "train" / ".DS_Store").touch()
    (output / "val" / ".ipynb_checkpoints").mkdir()
    (output / "test" / "US__liver" / "@eaDir").mkdir()
    prepare(output, source)
    assert f"skipped in the source and in {output}: 5.\n" in capsys.readouterr().out
    assert ImageFiles.find(output / "train").classes == ["CT__abd__normal", "MR__knee__acl", "US__liver"]


def test_hidden_files_in_the_lists_are_skipped_and_counted(source, output, capsys):
    hidden = ["radiology_ai/US/liver/._train0.png", "radiology_ai/US/.ipynb_checkpoints/train0.png"]
    for filename in hidden:
        (source / filename).parent.mkdir(exist_ok=True)
        (source / filename).write_bytes(b"no image")
    write_lists(source, {"train": [*filenames_of("train"), *hidden]})
    prepare(output, source)
    assert "The lists name 2 hidden files, which are skipped.\n" in capsys.readouterr().out
    assert contents(output) == expected(source)


def test_hidden_members_of_an_archive_are_skipped_and_counted(source, output, tmp_path, capsys):
    """As macOS writes them, next to each file and below __MACOSX."""
    stub = b"\0\5\26\7 Mac OS X"
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in sorted(source.rglob("*.*"), key=lambda path: (path.suffix != ".csv", path)):
            name = path.relative_to(source)
            for hidden in (name.with_name(f"._{name.name}"), "__MACOSX" / name):
                member = tarfile.TarInfo(f"./{hidden}")
                member.size = len(stub)
                tar.addfile(member, io.BytesIO(stub))
            tar.add(path, f"./{name}")
    prepare(output, archive=tmp_path / "images.tar")
    assert contents(output) == expected(source)
    assert f"{tmp_path / 'images.tar'}: skipped 40 hidden members\n" in capsys.readouterr().out


def test_an_archive_below_a_hidden_folder_is_read(source, output, tmp_path, capsys):
    prepare(output, archive=pack(source, tmp_path / "images.tar", folder=os.path.join(".cache", "data")))
    assert contents(output) == expected(source)
    assert "skipped" not in capsys.readouterr().out
