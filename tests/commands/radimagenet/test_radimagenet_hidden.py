"""Hidden leftovers in the source, the archive, the lists and the tree: skipped and counted."""

import io
import os
import tarfile

from tests.helpers.radimagenet import contents, expected, filenames_of, pack, write_lists
from utils.data.folders import ImageFiles
from utils.radimagenet.__main__ import prepare


def test_hidden_files_of_the_source_and_of_the_tree_are_skipped(source, output, capsys):
    (source / "radiology_ai/US/liver/._train0.png").write_bytes(b"no image")
    (source / "radiology_ai/US/liver/.ipynb_checkpoints").mkdir()
    prepare(output, source)
    whole = contents(output)
    assert whole == expected(source)
    assert "Hidden files or folders skipped in the source and in" in capsys.readouterr().out
    (output / "train" / ".DS_Store").touch()
    (output / "val" / ".ipynb_checkpoints").mkdir()
    (output / "test" / "US__liver" / "@eaDir").mkdir()
    prepare(output, source)
    assert f"skipped in the source and in {output}: 5.\n" in capsys.readouterr().out
    assert ImageFiles.find(output / "train").classes == ["CT__abd__normal", "MR__knee__acl", "US__liver"]


def test_hidden_files_that_the_lists_name_are_skipped(source, output, capsys):
    names = {split: filenames_of(split) for split in ("train", "val", "test")}
    for filename in ("radiology_ai/US/liver/._train0.png", "radiology_ai/US/.ipynb_checkpoints/train0.png"):
        (source / filename).parent.mkdir(exist_ok=True)
        (source / filename).write_bytes(b"no image")
        names["train"].append(filename)
    write_lists(source, names)
    prepare(output, source)
    assert "The lists name 2 hidden files, which are skipped.\n" in capsys.readouterr().out
    assert contents(output) == expected(source)


def test_an_archive_made_on_macos_is_read(source, output, tmp_path, capsys):
    stub = b"\0\5\26\7 Mac OS X"
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in sorted(source.rglob("*"), key=lambda path: (path.suffix != ".csv", path)):
            if path.is_file():
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
    prepare(output, archive=pack(source, tmp_path / "images.tar", folder=".cache/data"))
    assert contents(output) == expected(source)
    assert "skipped" not in capsys.readouterr().out


def test_lists_in_utf16_are_read(source, output):
    for split in ("train", "val", "test"):
        path = source / f"RadiologyAI_{split}.csv"
        path.write_bytes(path.read_text().replace("\n", os.linesep).encode("utf-16"))
    prepare(output, source)
    assert contents(output) == expected(source)
