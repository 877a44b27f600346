"""Archives that claim more than they hold are refused before anything is unpacked."""

import io
import struct
import zipfile

import pytest
import torch

from tests.helpers.states import as_bytes
from utils.checkpoints import checkpoint
from utils.runtime.errors import UserError


def zip_of(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def records_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def compressed(state: dict) -> bytes:
    return zip_of(records_of(as_bytes(state)), zipfile.ZIP_DEFLATED)


def split(archive: bytes) -> tuple[bytes, bytes]:
    """A zip's bytes before its directory, and the directory without the end record."""
    size, offset = struct.unpack("<2L", archive[-10:-2])
    return archive[:offset], archive[offset : offset + size]


def end_record(count: int, size: int, offset: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, offset, 0)


def test_sizes_are_checked_before_anything_is_unpacked(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a record was unpacked")

    bomb = compressed({"a": torch.zeros(1000)})
    before, directory = split(zip_of({"archive/data.pkl": b"x" * 100}))
    overlapping = before + 50 * directory + end_record(50, 50 * len(directory), len(before))
    for module, function in ((zipfile.ZipFile, "read"), (zipfile.ZipFile, "open"), (torch, "load")):
        monkeypatch.setattr(module, function, fail)
    for content, match in (
        (bomb, "are compressed, which torch.save never does"),
        (overlapping, "records claim more bytes than the file has"),
    ):
        (tmp_path / "bomb.pth").write_bytes(content)
        with pytest.raises(UserError, match=f"bomb.pth: not a checkpoint, or damaged .*{match}"):
            checkpoint.read(tmp_path / "bomb.pth")


def test_torch_reads_the_records_that_were_verified(tmp_path):
    """In a zip with two directories, Python reads the one before the end record, torch the one it points to."""
    hidden = compressed({"a": torch.zeros(1_000_000)})
    seen = zip_of(records_of(as_bytes({"a": torch.zeros(4)})))
    before_hidden, hidden_directory = split(hidden)
    before_seen, directory = split(seen)
    assert len(directory) == len(hidden_directory)
    moved = len(before_hidden) + len(hidden_directory)  # the second archive's offset
    python_adds = moved + len(before_seen) - len(before_hidden)  # because the end record names the first directory
    place = 0
    patched = bytearray(directory)
    while place < len(directory):
        lengths = struct.unpack_from("<3H", directory, place + 28)
        (offset,) = struct.unpack_from("<l", directory, place + 42)
        struct.pack_into("<l", patched, place + 42, offset + moved - python_adds)
        place += 46 + sum(lengths)
    end = end_record(len(records_of(seen)), len(directory), len(before_hidden))
    path = tmp_path / "confusing.pth"
    path.write_bytes(before_hidden + hidden_directory + before_seen + patched + end)
    assert torch.load(path, weights_only=True)["a"].shape == (1_000_000,)
    assert torch.equal(checkpoint.read(path)["a"], torch.zeros(4))
