"""Bits and frames by an image's header: refused before decoding, whatever mode Pillow reports."""

import re
import struct

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from _normal import train as normal
from tests.helpers.caches import splits
from tests.helpers.exports import write_checkpoint
from tests.helpers.image_files import png, saved
from utils import arguments
from utils.audit import __main__ as audit_command
from utils.audit.images import measure
from utils.checkpoints.checkpoint import read_weights
from utils.data.images import read_image
from utils.runtime.errors import UserError

WIDE = np.array([0, 255, 256, 40_000, 65_535])  # levels of 16 bits
NARROW = (WIDE >> 8).tolist()


def wide(*channels: np.ndarray, order: str = ">") -> bytes:
    return np.stack(channels, 1).astype(f"{order}u2").tobytes()


def tiff(pixels: bytes, bits: tuple[int, ...], *, width: int = 5, extra: int | None = None, order: str = "<",
         signed: bool = False, planes: bool = False, white_is_zero: bool = False,
         next_directory: int = 0) -> bytes:  # fmt: skip
    """A TIFF written by hand: one row, one strip (or one per channel), its only directory at offset 8."""
    many = len(bits)
    strips = many if planes else 1
    size = len(pixels) // strips
    photometric = 0 if white_is_zero else 1 if many < 3 else 2
    tags = [(256, 3, [width]), (257, 3, [1]), (258, 3, list(bits)), (259, 3, [1]), (262, 3, [photometric])]
    tags += [(273, 4, [1000 + size * strip for strip in range(strips)]), (277, 3, [many]), (278, 3, [1])]
    tags += [(279, 4, [size] * strips), (284, 3, [2 if planes else 1])]
    tags += [(338, 3, [extra])] if extra is not None else []
    tags += [(339, 3, [2] * many)] if signed else []
    directory, values, place = struct.pack(f"{order}H", len(tags)), b"", 8 + 2 + 12 * len(tags) + 4
    for tag, kind, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            values, packed = values + packed, struct.pack(f"{order}I", place + len(values))
        directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    whole = head + directory + struct.pack(f"{order}I", next_directory) + values
    return whole.ljust(1000, b"\0") + pixels


RGB16 = (WIDE, WIDE[::-1], WIDE)
GREY = [[level] * 3 for level in NARROW]
COLOUR = [list(pixel) for pixel in zip(NARROW, NARROW[::-1], NARROW, strict=True)]
TWELVE = [[level >> 4] * 3 for level in (0x000, 0xFFF, 0x800, 0x123, 0xFFF)]
DEEP = {  # content, bits a channel, and the pixels with --upper-8-bits; None: refused with it too
    "png grey": (png(5, 1, 16, 0, wide(WIDE)), 16, GREY),
    "png grey and alpha": (png(5, 1, 16, 4, wide(WIDE, WIDE)), 16, GREY),
    "png RGB": (png(5, 1, 16, 2, wide(*RGB16)), 16, COLOUR),
    "tiff grey, Motorola": (tiff(wide(WIDE), (16,), order=">"), 16, GREY),
    "tiff grey, packed": (
        saved(Image.fromarray(WIDE[None].astype(np.uint16)), "TIFF", compression="tiff_lzw"), 16, GREY
    ),
    "tiff grey, white is 0": (
        tiff(wide(WIDE, order="<"), (16,), white_is_zero=True), 16, [[255 - level] * 3 for level in NARROW]
    ),
    "tiff grey of 12 bits": (tiff(bytes.fromhex("000fff800123fff0"), (12,)), 12, TWELVE),
    "tiff RGB": (tiff(wide(*RGB16, order="<"), (16,) * 3), 16, COLOUR),
    "tiff RGBA": (tiff(wide(*RGB16, WIDE, order="<"), (16,) * 4, extra=2), 16, COLOUR),
    "tiff RGB in planes": (tiff(b"".join(wide(one, order="<") for one in RGB16), (16,) * 3, planes=True), 16, None),
    "tiff signed": (tiff(wide(WIDE, order="<"), (16,), signed=True), 16, None),
    "tiff of 32 bits": (saved(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF"), 32, None),
    "tiff float": (saved(Image.fromarray(np.array([[0, 0.5]], np.float32)), "TIFF"), 32, None),
    "pgm of 12 bits": (b"P5 5 1 4095\n" + wide(WIDE >> 4), 12, None),
    "ppm in text": (b"P3 1 1 256\n0 1 256\n", 9, None),
    "pfm": (b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5), 32, None),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused_or_reduced_on_request(name, tmp_path):
    content, bits, upper = DEEP[name]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    reason = re.escape(f"cannot be read as an image ({bits} bits a channel; save it with 8, windowed as it should be ")
    for read in (read_image, lambda path: read_image(path, gray=True), measure):
        with pytest.raises(UserError, match=reason + "seen, or give --upper-8-bits"):
            read(path)
    if upper is None:
        with pytest.raises(UserError, match="bits a channel; --upper-8-bits reduces only unsigned PNG"):
            read_image(path, upper_8_bits=True)
        return
    image = read_image(path, upper_8_bits=True)
    assert np.asarray(image).tolist() == [upper]
    gray = read_image(path, gray=True, upper_8_bits=True)
    assert np.array_equal(np.asarray(gray), np.asarray(image.convert("L")))
    np.testing.assert_allclose(measure(path, upper_8_bits=True)["mean"][:3], np.mean(upper, axis=0))


@pytest.mark.parametrize("upper_8_bits", [False, True])
def test_8_bits_and_fewer_are_read_unless_they_are_signed(upper_8_bits, tmp_path):
    contents = [
        (tiff(bytes([0, 7, 255, 1, 2]), (8,)), [0, 7, 255, 1, 2]),
        (tiff(bytes([0x0F, 0xF0, 0x80]), (4,)), [0, 255, 255, 0, 136]),
        (b"P5 3 1 100\n" + bytes([0, 50, 100]), [0, 128, 255]),
        (png(3, 1, 8, 4, bytes([1, 0, 2, 9, 3, 255])), [1, 2, 3]),
    ]
    for content, expected in contents:
        (tmp_path / "a.png").write_bytes(content)
        assert np.asarray(read_image(tmp_path / "a.png", upper_8_bits=upper_8_bits))[0, :, 0].tolist() == expected
    (tmp_path / "a.tif").write_bytes(tiff(bytes([0, 7, 255, 1, 2]), (8,), signed=True))
    with pytest.raises(UserError, match="signed levels, which Pillow reads as unsigned"):
        read_image(tmp_path / "a.tif", upper_8_bits=upper_8_bits)


# In the commands


@pytest.fixture
def deep_folder(tmp_path):
    """DATA/{train,val}/{a,b}: 16-bit grey images with alpha."""
    for split in ("train", "val"):
        for index in range(8):
            path = tmp_path / "data" / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(5, 1, 16, 4, wide(WIDE, WIDE)))
    return tmp_path / "data"


def test_a_cache_of_upper_8_bits_is_another_cache(deep_folder, tmp_path):
    with pytest.raises(UserError, match="all 8 images are unreadable"):
        splits(deep_folder, "--bad-images", "skip", cache_dir=tmp_path)
    cached = splits(deep_folder, "--upper-8-bits", "--bad-images", "skip", cache_dir=tmp_path)
    assert np.unique(np.asarray(cached.evaluation.read(0))).size > 2
    assert len(list(tmp_path.glob("train-*"))) == 2


def test_weights_remember_upper_8_bits_and_may_be_evaluated_with_it(tmp_path):
    parser = normal.build_parser()
    for trained, given, expected in (([], [], False), (["--upper-8-bits"], [], True), ([], ["--upper-8-bits"], True)):
        path = write_checkpoint(tmp_path / "model_0.pth", *trained)
        weights = read_weights(path)
        values = arguments.parse_given(parser, ["--resume", str(path), "--test-only", *given])
        args = arguments.for_weights(parser, values, weights.args, str(path), test_only=True)
        assert args.upper_8_bits == expected


def test_a_run_from_before_the_flag_can_be_given_it():
    parser = normal.build_parser()
    saved = arguments.defaults(parser)
    del saved["upper_8_bits"]
    given = arguments.parse_given(parser, ["--resume", "f", "--upper-8-bits"])
    assert arguments.for_resume(parser, given, saved, "f").upper_8_bits


def test_the_audit_reads_as_the_training_does(deep_folder, tmp_path, capsys):
    for flags, readable in (([], 0), (["--upper-8-bits"], 16)):
        audit_command.main([str(deep_folder), "-o", str(tmp_path / f"audit{readable}"), "-j", "0", *flags])
        rows = (tmp_path / f"audit{readable}" / "images.csv").read_text().splitlines()
        assert sum("PNG" in row for row in rows) == readable
        page = (tmp_path / f"audit{readable}" / "report.html").read_text()
        assert ("data:image/jpeg" in page) == bool(readable)  # thumbnails of the copies


# Frames


def directories(number: int, loop: bool = False) -> bytes:
    """A TIFF of several directories, each an image; the last leads nowhere, or back to the first."""
    first = tiff(bytes(5), (8,), next_directory=1008)
    content = bytearray(first.ljust(1008, b"\0"))
    directory = first[8:1000]
    length = 2 + 12 * struct.unpack("<H", directory[:2])[0]
    for index in range(1, number):
        last = index == number - 1
        content += directory[:length] + struct.pack("<I", (8 if loop else 0) if last else len(content) + length + 4)
    return bytes(content)


@pytest.mark.parametrize("loop", [False, True])
def test_only_the_first_directory_of_a_tiff_is_read(loop, tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    path.write_bytes(directories(5000, loop))
    loads = []
    load = TiffImagePlugin.ImageFileDirectory_v2.load
    monkeypatch.setattr(
        TiffImagePlugin.ImageFileDirectory_v2, "load", lambda self, fp: loads.append(fp.tell()) or load(self, fp)
    )
    with pytest.raises(UserError, match="it holds several frames; save each as a separate file"):
        read_image(path)
    assert set(loads) == {8}
