"""Windows: levels become 0 to 255 as they should, and equal what pydicom makes of a DICOM file's own window."""

import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tables import fails, placed, prepare, read_rows, write_table
from utils.data.images import read_image
from utils.prepare.pixels import DICOM, EIGHT_BITS, MORE_BITS, SIGMOID, Window, as_png, kind_of, recorded_window
from utils.runtime.errors import UserError

LEVELS = np.arange(64, dtype=np.uint16).reshape(8, 8) * 50


def shown(tmp_path, path, kind, given=None):
    """The pixels that training reads of the PNG, and the window."""
    png, window = as_png(str(path), kind, given)
    (tmp_path / "out.png").write_bytes(png)
    assert recorded_window(str(tmp_path / "out.png")) == window
    image = read_image(tmp_path / "out.png")
    return np.asarray(image.convert("L") if window else image), window


def write_dicom(path, levels=LEVELS, **elements):
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    data.Rows, data.Columns = levels.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = levels.dtype.itemsize * 8
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(levels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(data, name, value)
    data.PixelData = levels.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(0, 100, ""), [0, 0, 3, 128, 252, 255, 255]),  # 1 is 2.55 levels, 50 is 127.5: half to even
        (Window(50, 50, ""), [0, 0, 0, 0, 255, 255, 255]),
        (Window(0, 100, SIGMOID), [2, 30, 31, 128, 224, 225, 253]),  # 255 / (1 + exp(-4 (x - 50) / 100))
    ],
)
def test_levels_are_mapped_as_computed_by_hand(window, expected):
    assert window.apply(np.array([-70.0, 0, 1, 50, 99, 100, 170])).tolist() == expected


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("x.png", LEVELS),
        ("x.tif", LEVELS),
        ("x.tiff", LEVELS.astype(np.float32) - 500),
        ("x.tif", (LEVELS.astype(np.int32) - 500)),
    ],
)
def test_16_bit_signed_and_real_images_are_windowed(tmp_path, name, levels):
    Image.fromarray(levels).save(tmp_path / name)
    assert kind_of(str(tmp_path / name)) == MORE_BITS
    pixels, window = shown(tmp_path, tmp_path / name, MORE_BITS, (0.0, 2000.0))
    expected = np.rint(np.clip(levels.astype(np.float64) / 2000, 0, 1) * 255)
    assert (pixels == expected).all()
    assert window == Window(0, 2000, "given")
    pixels, window = shown(tmp_path, tmp_path / name, MORE_BITS)
    assert window == Window(*np.percentile(levels, (0.5, 99.5)), "percentiles")
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_a_tiff_whose_0_is_white_is_inverted(tmp_path):
    Image.fromarray(LEVELS).save(tmp_path / "x.tif", tiffinfo={262: 0})
    pixels, _ = shown(tmp_path, tmp_path / "x.tif", MORE_BITS, (0.0, 3150.0))
    assert pixels[0, 0] == 255 and pixels[-1, -1] == 0


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2, -1024)])
def test_dicom_with_its_own_window_is_what_pydicom_makes_of_it(tmp_path, function, slope, intercept):
    pydicom = pytest.importorskip("pydicom")
    window = {"WindowCenter": [700, 1], "WindowWidth": [901, 2], "RescaleSlope": slope, "RescaleIntercept": intercept}
    path = write_dicom(tmp_path / "x.dcm", **window, **({"VOILUTFunction": function} if function else {}))
    assert kind_of(str(path)) == DICOM
    pixels, found = shown(tmp_path, path, DICOM)
    data = pydicom.dcmread(path)
    levels = pydicom.pixels.apply_modality_lut(data.pixel_array, data)
    theirs = pydicom.pixels.apply_windowing(levels, data)
    low, high = (slope * level + intercept for level in (0, 65535))  # the range of their result
    assert np.abs(pixels - (theirs - low) / (high - low) * 255).max() <= 0.5 + 1e-6
    assert found.origin == (SIGMOID if function == "SIGMOID" else "DICOM")


def test_a_given_window_applies_to_hounsfield_units_and_monochrome1_is_inverted(tmp_path):
    path = write_dicom(tmp_path / "x", LEVELS.astype(np.int16), RescaleSlope=1, RescaleIntercept=-1000,
                       PhotometricInterpretation="MONOCHROME1")  # fmt: skip
    assert kind_of(str(path)) == DICOM  # by its mark, without an ending
    pixels, _ = shown(tmp_path, path, DICOM, (-160.0, 240.0))
    expected = 255 - np.rint(np.clip((LEVELS.astype(int) - 1000 + 160) / 400, 0, 1) * 255)
    assert (pixels == expected).all()
    assert shown(tmp_path, path, DICOM)[1].origin == "percentiles"


def test_colours_of_dicom_stay_as_they_are(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    settings = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    pixels, window = shown(tmp_path, write_dicom(tmp_path / "x.dcm", colours, **settings), DICOM)
    assert window is None
    assert (pixels == colours).all()


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"NumberOfFrames": 2}, "holds 2 frames; save each as a separate file"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "its pixels are PALETTE COLOR; expected grey levels or RGB"),
        ({"Rows": 60_000, "Columns": 60_000}, "60000 x 60000 pixels, more than"),
        ({"Rows": 20}, "cannot be read as DICOM"),
    ],
)
def test_dicom_without_one_readable_image_is_a_sentence(tmp_path, elements, message):
    path = write_dicom(tmp_path / "x.dcm")
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(path)
    for name, value in elements.items():
        setattr(data, name, value)
    data.save_as(path)
    with pytest.raises(UserError, match=message):
        as_png(str(path), DICOM, None)
    path.write_bytes(b"no dicom")
    with pytest.raises(UserError, match=r"x.dcm: a DICOM file without an image \(it has no PixelData\)\."):
        as_png(str(path), DICOM, None)


def test_compression_without_a_decoder_is_a_sentence(tmp_path, monkeypatch):
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(write_dicom(tmp_path / "x.dcm"))
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    data.PixelData = pydicom.encaps.encapsulate([bytes(100)])
    data.save_as(tmp_path / "x.dcm")
    monkeypatch.setattr(pydicom.pixels.get_decoder(pydicom.uid.JPEGLSLossless), "_available", {})
    with pytest.raises(UserError, match=r"compressed as JPEG-LS Lossless .* needs another decoder; pip install"):
        as_png(str(tmp_path / "x.dcm"), DICOM, None)


def write_deep_table(tmp_path):
    for number in range(8):
        Image.fromarray(LEVELS + number).save(tmp_path / f"{number}.png")
    Image.fromarray((LEVELS // 20).astype(np.uint8)).save(tmp_path / "8.png")
    return write_table(tmp_path / "t.csv", [(f"{number}.png", "ab"[number % 2], "", "") for number in range(9)])


def test_the_command_writes_and_records_windows_and_links_8_bit_images(tmp_path, capsys):
    table, data = write_deep_table(tmp_path), tmp_path / "data"
    assert "8 images of more than 8 bits need a window" in fails(table, data)
    assert not data.exists()
    prepare(table, data, "--window", "auto", "--val", ".3", "--test", "0")
    assert "1 image of 8 bits already, linked unchanged" in capsys.readouterr().out
    rows = {row["source"]: row for row in read_rows(data / "images.csv")}
    assert rows[str(tmp_path / "8.png")]["window_low"] == ""
    low, high = np.percentile(LEVELS + 3, (0.5, 99.5))
    row = rows[str(tmp_path / "3.png")]
    assert (float(row["window_low"]), float(row["window_high"]), row["window_from"]) == (low, high, "percentiles")
    images = placed(data)
    prepare(table, data, "--window", "auto", "--val", ".3", "--test", "0")
    assert {row["source"]: row for row in read_rows(data / "images.csv")} == rows
    assert placed(data) == images
    assert all(kind_of(str(data / name)) == EIGHT_BITS for name in images)


def test_folds_share_one_converted_file(tmp_path):
    table, data = write_deep_table(tmp_path), tmp_path / "data"
    prepare(table, data, "--window", "-50", "4000", "--folds", "2", "--test", "0")
    folds = [{path.name: path for path in (data / f"fold_{k}").rglob("?.png")} for k in range(2)]
    assert len(folds[0]) == 9
    for name, path in folds[0].items():
        assert path.samefile(folds[1][name])
        assert path.parent.parent.name != folds[1][name].parent.parent.name


def test_without_pydicom_the_sentence_names_it(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.dcm").write_bytes(bytes(128) + b"DICM")
    table = write_table(tmp_path / "t.csv", [(f"{number}.dcm", "ab"[number % 2], "", "") for number in range(4)])
    assert "4 DICOM files need a window" in fails(table, tmp_path / "data")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    message = fails(table, tmp_path / "data", "--window", "auto", "--val", ".5", "--test", "0")
    assert message == "DICOM files need pydicom 3 or later: pip install 'pydicom>=3'."
