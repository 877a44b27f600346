"""RadImageNet from tar archives: the same tree as from the folder, and nothing of a hostile or damaged one."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.helpers.radimagenet import SUMMARY, contents, expected, fails, filenames_of, pack, rows_of
from utils.radimagenet.__main__ import main, prepare


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
    if name.endswith(".tar"):
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
        starts = [member.offset for member in members]  # every boundary between members, of the first too
        end = members[-1].offset_data + members[-1].size
        cuts = [*starts, members[3].offset + 100, members[9].offset_data, members[9].offset_data + 100]
    else:
        end, cuts = len(data), range(0, len(data), 291)
    for cut in [*cuts, end - 1]:
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


def write_header(archive: Path, name: str, kind: bytes, size: int, **options: dict[str, str]) -> None:
    """An archive of a header alone, that claims so many bytes after it."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    member.pax_headers = options
    archive.write_bytes(member.tobuf(tarfile.PAX_FORMAT))


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X"])
def test_an_extended_header_is_refused_for_its_claim_alone(source, output, tmp_path, kind):
    archive = tmp_path / "images.tar"
    write_header(archive, "././@LongLink", kind, 2**20)
    assert "(empty header)" in fails("--archive", archive, "--csv-dir", source, output)  # which was to come after it
    write_header(archive, "././@LongLink", kind, 3 * 2**29)
    assert fails("--archive", archive, "--csv-dir", source, output) == (
        f"{archive}: is no tar archive, damaged or cut short (an extended header has 1610612736 bytes); get it again."
    )


def test_headers_for_all_members_are_refused_for_their_sum(source, output, tmp_path):
    archive = tmp_path / "images.tar"
    data = b""
    for letter in "ab":
        data += tarfile.TarInfo.create_pax_global_header({letter: 600_000 * "."}) + tarfile.TarInfo("file").tobuf()
    archive.write_bytes(data)
    assert "(an extended header has 6000" in fails("--archive", archive, "--csv-dir", source, output)


def test_header_after_header_is_refused(source, output, tmp_path):
    member = tarfile.TarInfo("././@LongLink")
    member.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "images.tar").write_bytes(member.tobuf() * 1000)
    assert "(maximum recursion depth" in fails("--archive", tmp_path / "images.tar", "--csv-dir", source, output)


def test_sparse_files_are_refused(source, output, tmp_path):
    archive = tmp_path / "images.tar"
    write_header(archive, "a.png", tarfile.GNUTYPE_SPARSE, 0)
    assert "(a file in it is sparse)" in fails("--archive", archive, "--csv-dir", source, output)
    write_header(archive, "a.png", tarfile.REGTYPE, 0, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    assert "(a file in it is sparse)" in fails("--archive", archive, "--csv-dir", source, output)


@pytest.mark.parametrize(("name", "most"), [("a.png", 2**26), ("a.csv", 2**30)])
def test_a_member_too_long_is_refused_for_its_claim_alone(source, output, tmp_path, name, most):
    archive = tmp_path / "images.tar"
    write_header(archive, name, tarfile.REGTYPE, most)
    assert "cut short (unexpected end of data)" in fails("--archive", archive, "--csv-dir", source, output)
    write_header(archive, name, tarfile.REGTYPE, most + 1)
    message = fails("--archive", archive, "--csv-dir", source, output)
    assert message == f"{archive}: its member {name!r} has {most + 1} bytes; remove it."
