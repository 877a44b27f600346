"""Names in any script: drawn with an installed font that has their characters, or else as escapes, without warnings."""

import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from utils.results import figures
from utils.results.confusion import confusion_matrix
from utils.results.figures import as_png, as_svg, as_text, in_lines, shorten

NAME = "\u80ba-\u7d50"  # two characters that matplotlib's own font lacks


@pytest.fixture(autouse=True)
def fonts(tmp_path, monkeypatch):
    """install(name, letters): adds a font in which each letter is a square, next to matplotlib's own."""
    paths = [font_manager.findfont("DejaVu Sans")]
    monkeypatch.setattr(figures, "DOTS_PER_INCH", 40)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    figures.fallback_fonts.cache_clear()

    def install(name, letters):
        names = {ord(letter): f"u{ord(letter):x}" for letter in letters}
        font = FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder([".notdef", *names.values()])
        font.setupCharacterMap(names)
        font.setupGlyf({glyph: square() for glyph in (".notdef", *names.values())})
        font.setupHorizontalMetrics(dict.fromkeys((".notdef", *names.values()), (1000, 0)))
        font.setupHorizontalHeader(ascent=900, descent=-100)
        font.setupNameTable({"familyName": name, "styleName": "Regular"})
        font.setupOS2()
        font.setupPost()
        font.save(tmp_path / f"{name}.ttf")
        paths.append(str(tmp_path / f"{name}.ttf"))

    yield install
    figures.fallback_fonts.cache_clear()


def square():
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()


def draw(classes):
    """The figure, drawn; any warning is an error."""
    figure = confusion_matrix([0, 1], [0, 0], classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_png(figure), as_svg(figure)
    return figure


def test_without_a_font_characters_are_escapes():
    assert as_text(f"{NAME} $") == r"\u80ba-\u7d50 \$"
    assert len(shorten(NAME[0] * 20)) < 50
    assert in_lines(NAME[0] * 5, 14) == "\n".join([r"\u80ba\u80ba"] * 2 + [r"\u80ba"])  # never broken within one
    figure = draw([NAME, "b"])
    assert figure.axes[0].get_yticklabels()[0].get_text() == r"\u80ba-\u7d50 (1)"
    assert figure.axes[0].get_yticklabels()[0].get_fontfamily() == ["sans-serif"]


def test_an_installed_font_is_used_for_the_characters_it_has(fonts):
    fonts("Squares", NAME[0])
    assert as_text(NAME) == "\u80ba-\\u7d50"
    figure = draw([NAME, "b"])
    for label in figure.axes[0].get_yticklabels():
        assert label.get_fontfamily() == ["sans-serif", "Squares"]


def test_the_fonts_with_most_of_the_characters_are_taken_upright_sans_first(fonts):
    fonts("Bold Sans", NAME)
    fonts("Other", NAME)
    fonts("Some Sans", NAME[0])
    fonts("Good Sans", NAME)
    letters = "".join(sorted(set(NAME) - {"-"}))
    assert [path.split("/")[-1] for path in figures.fallback_fonts(letters)] == ["Good Sans.ttf"]
    assert figures.fallback_fonts("\ue123") == ()


def test_a_broken_font_is_passed_over(fonts, tmp_path):
    fonts("Squares", NAME)
    (tmp_path / "Squares.ttf").write_bytes(b"no font")
    assert as_text(NAME) == r"\u80ba-\u7d50"
