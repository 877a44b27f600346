"""What all figures share: colours, names as labels, and files. Figures are made without pyplot's global state."""

import io
import re
import textwrap
from contextlib import suppress
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from utils.runtime.errors import UserError
from utils.runtime.files import check_absent, make_parent, write_atomically
from utils.runtime.text import printable

# The colours of Okabe and Ito, which colour-blind readers can tell apart, without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK, FAINT = "0.15", "0.85"
DOTS_PER_INCH = 150
LARGE, DOTS_PER_INCH_OF_LARGE = 15, 100  # inches of width or height from which on fewer dots do; 6 points stay legible
ESCAPE = r"\\[uU][0-9a-f]+"  # of a character that cannot be drawn
LONGEST_NAME, MOST_LINES = 48, 4  # characters of a label, and its lines if it is broken
LONGEST_LINE = 60  # characters of a line of a title's note


def as_text(name: str) -> str:
    """A name as matplotlib can write it: printable, and with no $ taken for mathematics."""
    return _escape_dollars(drawable(name))


def shorten(name: str) -> str:
    """A name as a label; the middle of a very long name is left out."""
    text, half = drawable(name), LONGEST_NAME // 2 - 1
    return _escape_dollars(text if len(text) <= LONGEST_NAME else f"{text[:half]}…{text[-half:]}")


def in_lines(name: str, width: int) -> str:
    """A name as a label of lines of at most `width`, broken after - _ / and spaces; a long one is cut in the middle."""
    pieces = re.findall(rf"{ESCAPE}|[^-_/ \\]{{1,{width}}}[-_/ ]?|[-_/ \\]", drawable(name))
    lines = [""]
    for piece in pieces:
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    kept = lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 2], "…", lines[-1]]
    return "\n".join(map(_escape_dollars, kept))


def figure_title(quantity: str, images: int, what: str, note: str) -> str:
    """A title of lines: the quantity and the number of images, what was evaluated, and a note, broken if it is long."""
    lines = [
        f"{quantity}, {images} images",
        as_text(what),
        "\n".join(textwrap.wrap(note, LONGEST_LINE, break_on_hyphens=False)),
    ]
    return "\n".join(filter(None, lines))


def drawable(name: str) -> str:
    """A printable name in which characters that no installed font has are escapes such as \\u80ba."""
    text = printable(name)
    unknown = set(text) - _characters(_default_font())
    unknown -= set().union(*map(_characters, fallback_fonts("".join(sorted(unknown)))))
    return "".join(letter.encode("unicode_escape").decode() if letter in unknown else letter for letter in text)


def _escape_dollars(text: str) -> str:
    return text.replace("$", r"\$")


@cache
def _default_font() -> str:
    return font_manager.findfont(font_manager.FontProperties())


@cache
def _characters(font: str) -> frozenset[str]:
    """The characters that a font file has; none if matplotlib cannot draw it."""
    with suppress(RuntimeError, OSError, ValueError):
        face = font_manager.get_font(font)
        if face.scalable:
            return frozenset(map(chr, face.get_charmap()))
    return frozenset()


@cache
def fallback_fonts(letters: str) -> tuple[str, ...]:
    """Installed font files that together have as many of these letters as possible; usually none or one.

    Upright sans-serif fonts are preferred. Names in Chinese, Japanese or Korean need one, because matplotlib's own
    font lacks them.
    """
    missing, chosen = set(letters), []
    if missing:
        fonts = [font for font in font_manager.findSystemFonts() if "lastresort" not in font.lower()]  # draws boxes
        fonts.sort(key=_unlike_default)
        while missing:
            best = max(fonts, key=lambda font: len(missing & _characters(font)), default=None)
            if best is None or not missing & _characters(best):
                break
            chosen.append(best)
            missing -= _characters(best)
    return tuple(chosen)


def _unlike_default(font: str) -> tuple[bool, bool, str]:
    name = Path(font).name.lower()
    is_styled = any(word in name for word in ("bold", "italic", "oblique", "light", "thin", "black", "serif", "mono"))
    is_sans = any(word in name for word in ("sans", "gothic", "hei", "yahei", "pingfang", "droid"))
    return is_styled, not is_sans, name


def _use_fallback_fonts(figure: Figure) -> None:
    texts = figure.findobj(Text)
    missing = set().union(*(text.get_text() for text in texts)) - _characters(_default_font()) - {"\n"}
    fonts = fallback_fonts("".join(sorted(missing)))
    if fonts:
        families = [*matplotlib.rcParams["font.family"], *map(_family, fonts)]
        for text in texts:
            text.set_fontfamily(families)


def _family(font: str) -> str:
    """The name by which matplotlib finds this font; a font that was installed after its list was made is added."""
    entry = next((entry for entry in font_manager.fontManager.ttflist if entry.fname == font), None)
    if entry is None:
        font_manager.fontManager.addfont(font)
        entry = font_manager.fontManager.ttflist[-1]
    return entry.name


def as_png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes each time with the same fonts and matplotlib."""
    return _save(figure, "png", {"Software": None})


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes each time. Text is drawn as paths, so that it looks the same everywhere."""
    return _save(figure, "svg", {"Date": None, "Creator": None})


def _save(figure: Figure, file_format: str, metadata: dict[str, None]) -> bytes:
    content = io.BytesIO()
    _use_fallback_fonts(figure)
    dots = DOTS_PER_INCH if max(figure.get_size_inches()) < LARGE else DOTS_PER_INCH_OF_LARGE
    with matplotlib.rc_context({"svg.hashsalt": "plots"}):
        figure.savefig(content, format=file_format, dpi=dots, bbox_inches="tight", metadata=metadata)
    return content.getvalue()


FORMATS = {".png": as_png, ".svg": as_svg}


def output_path(given: str | None, default: Path, overwrite: bool) -> Path:
    """The path of a command's picture: --output if given, or the default, which is always replaced.

    Raises UserError for a name that ends in neither .png nor .svg and, without `overwrite`, an --output that exists.
    """
    path = default if given is None else Path(given)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--output {path}: expected a name that ends in {' or '.join(FORMATS)}.")
    if given is not None:
        check_absent(path, overwrite)
        make_parent(path)
    return path


def write_figure(path: Path, figure: Figure) -> None:
    """Write a .png or .svg file, and create its folder if needed. Raises UserError if the file system refuses."""
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be created ({error.strerror}).") from None
    write_atomically(path, FORMATS[path.suffix.lower()](figure))
