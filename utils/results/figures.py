"""What all figures share: colours, names as labels, and files. Figures are made without pyplot's global state."""

import io
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from utils.runtime.errors import UserError
from utils.runtime.files import check_absent, write_atomically
from utils.runtime.text import printable

# The colours of Okabe and Ito, which colour-blind readers can tell apart, without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK, FAINT = "0.15", "0.85"
DOTS_PER_INCH = 150
LARGE, DOTS_PER_INCH_OF_LARGE = 15, 100  # inches of width or height from which on fewer dots do; 6 points stay legible
LONGEST_NAME, MOST_LINES = 48, 4  # characters of a label, and its lines if it is broken


def as_text(name: str) -> str:
    """A name as matplotlib can write it: printable, and with no $ taken for mathematics."""
    return printable(name).replace("$", r"\$")


def shorten(name: str) -> str:
    """A name as a label; the middle of a very long name is left out."""
    half = LONGEST_NAME // 2 - 1
    return as_text(name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}")


def in_lines(name: str, width: int) -> str:
    """A name as a label of lines of at most `width`, broken after - _ / and spaces; a long one is cut in the middle."""
    pieces = re.findall(rf"[^-_/ ]{{1,{width}}}[-_/ ]?|[-_/ ]", name)
    lines = [""]
    for piece in pieces:
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    kept = lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 2], "…", lines[-1]]
    return "\n".join(as_text(line) for line in kept)


def as_png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes each time with the same fonts and matplotlib."""
    return _save(figure, "png", {"Software": None})


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes each time. Text is drawn as paths, so that it looks the same everywhere."""
    return _save(figure, "svg", {"Date": None, "Creator": None})


def _save(figure: Figure, file_format: str, metadata: dict[str, None]) -> bytes:
    content = io.BytesIO()
    dots = DOTS_PER_INCH if max(figure.get_size_inches()) < LARGE else DOTS_PER_INCH_OF_LARGE
    with matplotlib.rc_context({"svg.hashsalt": "plots"}):
        figure.savefig(content, format=file_format, dpi=dots, bbox_inches="tight", metadata=metadata)
    return content.getvalue()


FORMATS = {".png": as_png, ".svg": as_svg}


def output_path(given: str | None, default: Path, overwrite: bool) -> Path:
    """The path of a command's picture: --output if given, or the default, which is always replaced.

    Raises UserError for a name that ends in neither .png nor .svg, and for an --output in a missing folder or, without
    `overwrite`, an --output that exists.
    """
    path = default if given is None else Path(given)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--output {path}: expected a name that ends in {' or '.join(FORMATS)}.")
    if given is not None:
        if not path.parent.is_dir():
            raise UserError(f"--output {path}: {path.parent} is not a folder; create it first.")
        check_absent(path, overwrite)
    return path


def write_figure(path: Path, figure: Figure) -> None:
    """Write a .png or .svg file, and create its folder if needed. Raises UserError if the file system refuses."""
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be created ({error.strerror}).") from None
    write_atomically(path, FORMATS[path.suffix.lower()](figure))
