"""8-bit images of 16-bit images and of DICOM files, through a window of levels."""

import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.data.images import PHOTOMETRIC, bits_per_channel, open_image
from utils.data.listing import is_image
from utils.runtime.errors import UserError
from utils.runtime.reading import open_regular

EIGHT_BITS, MORE_BITS, DICOM = "8 bits", "more than 8 bits", "DICOM"  # kinds of sources
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
PREAMBLE = 128  # bytes before the mark of a DICOM file
PERCENTILES = (0.5, 99.5)  # of an image without a window of its own, for --window auto
SIGMOID = "DICOM-SIGMOID"  # the function instead of a line from low to high
TEXT = "window"  # key in the PNG
DECODERS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"


class Window(NamedTuple):
    """Levels that become 0 and 255; origin: "given", "DICOM" or SIGMOID (of the file), "percentiles" (of the image)."""

    low: float
    high: float
    origin: str

    def apply(self, levels: np.ndarray) -> np.ndarray:
        """The levels (H, W) as uint8, rounded; a window without width separates levels above it from the others."""
        centre, width = (self.low + self.high) / 2, self.high - self.low
        if width <= 0:
            return np.where(levels > centre, 255, 0).astype(np.uint8)
        if self.origin == SIGMOID:
            shares = 1 / (1 + np.exp(-4 * (levels - centre) / width))
        else:
            shares = ((levels - self.low) / width).clip(0, 1)
        return np.rint(shares * 255).astype(np.uint8)


class Pixels(NamedTuple):
    """levels: (H, W) float64, or (H, W, 3) uint8 colours of a DICOM file; inverted: whether 0 means white."""

    levels: np.ndarray
    inverted: bool = False
    window: Window | None = None  # the file's own


def kind_of(path: str) -> str:
    """EIGHT_BITS, MORE_BITS or DICOM, from the header. Raises UserError for a file that cannot be used."""
    try:
        with open_regular(path) as file:
            beginning = file.read(PREAMBLE + 4)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    if beginning[PREAMBLE:] == b"DICM" or path.lower().endswith(DICOM_ENDINGS):
        return DICOM
    with open_image(Path(path), any_depth=True) as image:
        kind = MORE_BITS if bits_per_channel(image) > 8 else EIGHT_BITS
    if kind == EIGHT_BITS and not is_image(path):
        raise UserError(f"{path}: its name does not end as that of an image, such as .png; rename it.")
    return kind


def as_png(path: str, kind: str, given: tuple[float, float] | None) -> tuple[bytes, Window | None]:
    """An 8-bit PNG of a source, and the window that made it; None for DICOM in colour, which has 8 bits already.

    given: (low, high), or None for the file's own window, else PERCENTILES. The PNG holds the window as text. Raises
    UserError for unreadable files, and for those that no window can be applied to.
    """
    levels, inverted, window = read_dicom(path) if kind == DICOM else _read_image(path)
    if levels.ndim == 3:
        image, window = Image.fromarray(levels), None
    else:
        if not np.isfinite(levels).all():
            raise UserError(f"{path}: has levels that are not finite; replace or remove it.")
        if given is not None:
            window = Window(*given, "given")
        elif window is None:
            window = Window(*(float(f"{level:.6g}") for level in np.percentile(levels, PERCENTILES)), "percentiles")
        pixels = window.apply(levels)
        image = Image.fromarray(255 - pixels if inverted else pixels)
    text, buffer = PngInfo(), io.BytesIO()
    if window is not None:
        text.add_text(TEXT, f"{window.low!r} {window.high!r} {window.origin}")
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue(), window


def recorded_window(path: str) -> Window | None:
    """The window in a PNG of `as_png`; None without one."""
    with open_image(Path(path)) as image:
        text = image.info.get(TEXT)
    if text is None:
        return None
    low, high, origin = text.split()
    return Window(float(low), float(high), origin)


def _read_image(path: str) -> Pixels:
    """The levels of a grey PNG, TIFF or PPM image of more than 8 bits."""
    with open_image(Path(path), any_depth=True) as image:
        if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
            raise ValueError("more than 8 bits in several channels, but a window applies to grey images only")
        inverted = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0
        return Pixels(np.asarray(image).astype(np.float64), inverted)


def read_dicom(path: str) -> Pixels:
    """The levels of a DICOM file after its modality transformation (Hounsfield units of CT), and its first window.

    Raises UserError for unreadable files, several frames, palettes, and compression that no installed decoder reads.
    """
    import pydicom
    from pydicom.pixels import apply_modality_lut, get_decoder, pixel_array

    try:
        with open_regular(path) as file:
            data = pydicom.dcmread(file, force=True)
        for name in ("PixelData", "Rows", "Columns"):
            if name not in data:
                raise UserError(f"{path}: a DICOM file without an image (it has no {name}).")
        if (frames := int(data.get("NumberOfFrames") or 1)) > 1:
            raise UserError(f"{path}: holds {frames} frames; save each as a separate file.")
        if data.Rows * data.Columns > Image.MAX_IMAGE_PIXELS:
            raise UserError(f"{path}: {data.Columns} x {data.Rows} pixels, more than {Image.MAX_IMAGE_PIXELS}.")
        if not hasattr(data, "file_meta") or "TransferSyntaxUID" not in data.file_meta:
            data.file_meta = getattr(data, "file_meta", None) or pydicom.dataset.FileMetaDataset()
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # DICOM's default
        syntax = data.file_meta.TransferSyntaxUID
        if syntax.is_compressed and syntax.is_encapsulated and not get_decoder(syntax).is_available:
            raise UserError(f"{path}: compressed as {syntax.name}, which needs another decoder; {DECODERS}.")
        photometric = data.get("PhotometricInterpretation", "")
        levels = pixel_array(data)  # YBR becomes RGB
        if photometric.startswith(("RGB", "YBR")) and levels.dtype == np.uint8 and levels.ndim == 3:
            return Pixels(levels)
        if not photometric.startswith("MONOCHROME") or levels.ndim != 2:
            raise UserError(f"{path}: its pixels are {photometric or 'of no kind'}; expected grey levels or RGB.")
        levels = apply_modality_lut(levels, data).astype(np.float64)
        return Pixels(levels, photometric == "MONOCHROME1", _own_window(data))
    except UserError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds
        raise UserError(
            f"{path}: cannot be read as DICOM ({' '.join(str(error).split())[:200]}); replace or remove it."
        ) from None


def _own_window(data: Any) -> Window | None:
    """The first window of a DICOM file, by its function (part 3, C.11.2.1.2); None without a usable one."""
    centre, width = (np.atleast_1d(data.get(name, [])) for name in ("WindowCenter", "WindowWidth"))
    function = data.get("VOILUTFunction") or "LINEAR"
    if not (centre.size and width.size):
        return None
    centre, width = float(centre[0]), float(width[0])
    if function == "LINEAR" and width >= 1:
        return Window(centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2, "DICOM")
    if function in ("LINEAR_EXACT", "SIGMOID") and width > 0:
        return Window(centre - width / 2, centre + width / 2, SIGMOID if function == "SIGMOID" else "DICOM")
    return None


def check_pydicom() -> None:
    """Raise UserError without pydicom."""
    try:
        import pydicom.pixels  # since version 3
    except ImportError:
        raise UserError("DICOM files need pydicom 3 or later: pip install 'pydicom>=3'.") from None
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module=r"pydicom\.")  # about odd values and padding in single files
