"""RadImageNet from tar archives: the same tree as from a folder; hostile and damaged archives are refused."""

import io
import os
import tarfile

import pytest

from tests.helpers.radimagenet import SUMMARY, contents, expected, fails, filenames_of, pack
from utils.radimagenet.__main__ import prepare

DAMAGED = "images.tar: not a tar archive, or damaged or truncated"


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz", "images.tgz"])
@pytest.mark.parametrize("folder", [".", "rin2d/of_radiology_ai"])
def test_an_archive_gives_the_same_tree_as_a_folder(source, output, tmp_path, name, folder):
    prepare(output, archive=pack(source, tmp_path / name, folder))
    assert contents(output) == expected(source)
    assert (output / "summary.csv").read_text() == SUMMARY
    image = output / "train/US__liver/train1.png"
    assert os.stat(image).st_mtime == os.stat(source / "radiology_ai/US/liver/train1.png").st_mtime


def test_the_lists_come_before_the_images_or_from_elsewhere(source, output, tmp_path):
    archive = pack(source, tmp_path / "images.tar.gz", lists="last")
    message = fails("--archive", archive, output)
    assert "images.tar.gz: has no RadiologyAI_train.csv before its first image or next to it; put Rad" in message
    prepare(output, archive=archive, csv_dir=source)
    assert contents(output) == expected(source)
    archive = pack(source, source / "images.tar.gz", lists="absent")  # next to the lists
    prepare(tmp_path / "second", archive=archive)
    assert contents(tmp_path / "second") == expected(source)


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


def test_strange_times_become_zero_and_an_image_may_occur_once(source, output, tmp_path):
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
    message = fails("--archive", archive, "--csv-dir", source, output)
    assert message == "radiology_ai/US/liver/val0.png: is twice in the archive; download it again."


# Damaged archives


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz"])
def test_a_truncated_archive_is_refused_and_resumed_when_complete(source, output, tmp_path, name):
    archive = pack(source, tmp_path / name)
    data = archive.read_bytes()
    if name.endswith(".tar"):
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
        starts = [member.offset for member in members]  # every boundary between members, and the start
        end = members[-1].offset_data + members[-1].size
        cuts = [*starts, members[3].offset + 100, members[9].offset_data, members[9].offset_data + 100]
    else:
        end, cuts = len(data), range(0, len(data), 291)
    for cut in [*cuts, end - 1]:
        archive.write_bytes(data[:cut])
        assert "damaged or truncated" in fails("--archive", archive, "--csv-dir", source, output)
        assert contents(output).items() <= expected(source).items()
    archive.write_bytes(data)
    prepare(output, archive=archive)
    assert contents(output) == expected(source)


def test_a_damaged_archive_is_refused(source, output, tmp_path):
    archive = pack(source, tmp_path / "images.tar.gz")
    data = bytearray(archive.read_bytes())
    data[-5] ^= 1  # in gzip's checksum and length
    archive.write_bytes(data)
    assert "images.tar.gz: not a tar archive, or damaged or truncated" in fails("--archive", archive, output)
    archive = pack(source, tmp_path / "images.tar")
    data = bytearray(archive.read_bytes())
    data[data.index(b"./radiology_ai/MR") + 2] ^= 1  # in a header, so that its checksum is wrong
    archive.write_bytes(data)
    assert "damaged or truncated" in fails("--archive", archive, output)
    archive.write_text("no archive")
    assert DAMAGED in fails("--archive", archive, "--csv-dir", source, output)


# Oversized headers and members


def header(name: str, kind: bytes, size: int, **options: str) -> bytes:
    """A header that claims this many bytes after it."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    member.pax_headers = options
    return member.tobuf(tarfile.PAX_FORMAT)


LINK = "././@LongLink"
KINDS = {"long name": b"L", "long link": b"K", "pax": b"x", "global": b"g", "solaris": b"X"}
GLOBAL = [tarfile.TarInfo.create_pax_global_header({key: 600_000 * "."}) + tarfile.TarInfo("x").tobuf() for key in "ab"]
GNU_SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
OVERSIZED = {  # archives and the reasons for which they are refused
    "longest name": (header(LINK, b"L", 2**20), "empty header"),  # accepted, but without data
    **{name: (header(LINK, kind, 3 * 2**29), "an extended header has 1610612736") for name, kind in KINDS.items()},
    "sum of global headers": (b"".join(GLOBAL), "an extended header has 6000"),
    "header after header": (header(LINK, b"L", 0) * 1000, "maximum recursion depth"),
    "GNU sparse": (header("a.png", tarfile.GNUTYPE_SPARSE, 0), "it contains a sparse file"),
    "pax sparse": (header("a.png", tarfile.REGTYPE, 0, **GNU_SPARSE), "it contains a sparse file"),
    "longest image": (header("a.png", tarfile.REGTYPE, 2**26), "unexpected end of data"),
    "longest list": (header("a.csv", tarfile.REGTYPE, 2**30), "unexpected end of data"),
}


@pytest.mark.parametrize("name", OVERSIZED)
def test_headers_that_would_fill_the_memory_are_refused(source, output, tmp_path, name):
    data, reason = OVERSIZED[name]
    (tmp_path / "images.tar").write_bytes(data)
    message = fails("--archive", tmp_path / "images.tar", "--csv-dir", source, output)
    assert f"{DAMAGED} ({reason}" in message


@pytest.mark.parametrize(("name", "size"), [("a.png", 2**26 + 1), ("a.csv", 2**30 + 1)])
def test_a_member_that_claims_too_many_bytes_is_refused(source, output, tmp_path, name, size):
    archive = tmp_path / "images.tar"
    archive.write_bytes(header(name, tarfile.REGTYPE, size))
    message = fails("--archive", archive, "--csv-dir", source, output)
    assert message == f"{archive}: its member {name!r} has {size} bytes; remove it."
