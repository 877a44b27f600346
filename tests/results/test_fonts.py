"""Names in any script: drawn with an installed font that has their characters, or else as escapes, without warnings.

Stands-in for fonts of other scripts: fonts of matplotlib with signs that its default font lacks.
"""

import shutil
import warnings
from pathlib import Path

import pytest
from matplotlib import font_manager

from utils.results import figures
from utils.results.confusion import confusion_matrix
from utils.results.figures import as_png, as_svg, as_text, in_lines, shorten

NAME = "\u80ba-\u7d50"  # two characters that no font here has
FONTS = Path(font_manager.findfont("DejaVu Sans")).parent


def signs(font: str) -> set[str]:
    """The printable characters of a font that matplotlib's default font lacks."""
    missing = figures._characters(str(FONTS / font)) - figures._characters(str(FONTS / "DejaVuSans.ttf"))
    return {sign for sign in missing if sign.isprintable()}


@pytest.fixture(autouse=True)
def install(tmp_path, monkeypatch):
    """install(font, name): a copy of a font of matplotlib, by this name, is the next one installed."""
    paths = [str(FONTS / "DejaVuSans.ttf")]
    monkeypatch.setattr(figures, "DOTS_PER_INCH", 40)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))

    def clear():
        for function in (figures.fallback_fonts, figures._characters):
            function.cache_clear()

    def install(font, name):
        paths.append(str(shutil.copy(FONTS / font, tmp_path / name)))
        clear()

    clear()
    yield install
    clear()


def draw(classes):
    """The figure, drawn; any warning is an error."""
    figure = confusion_matrix([0, 1], [0, 0], classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_png(figure)
        as_svg(figure)
    return figure


def test_without_a_font_characters_are_escapes():
    assert as_text(f"{NAME} $") == r"\u80ba-\u7d50 \$"
    assert len(shorten(NAME * 20)) < 50
    assert in_lines(NAME[0] * 5, 14) == "\n".join([r"\u80ba\u80ba"] * 2 + [r"\u80ba"])  # not broken within one
    label = draw([NAME, "b"]).axes[0].get_yticklabels()[0]
    assert label.get_text() == r"\u80ba-\u7d50 (1)"
    assert label.get_fontfamily() == ["sans-serif"]


def test_an_installed_font_is_used_for_the_characters_it_has(install):
    sign = min(signs("STIXGeneral.ttf"))
    assert as_text(sign) == sign.encode("unicode_escape").decode()
    install("STIXGeneral.ttf", "a.ttf")
    assert as_text(sign + NAME[0]) == sign + r"\u80ba"
    for label in draw([sign + NAME, "b"]).axes[0].get_yticklabels():
        assert label.get_fontfamily() == ["sans-serif", "STIXGeneral"]


def test_the_fonts_with_most_of_the_characters_are_taken_upright_sans_first(install, tmp_path):
    if not (FONTS / "LastResortHE-Regular.ttf").exists():
        pytest.skip("an older matplotlib, without that font")
    of_one = "".join(sorted(signs("STIXGeneral.ttf"))[:2])
    of_both = of_one + min(signs("DejaVuSerif.ttf") - signs("STIXGeneral.ttf"))
    install("LastResortHE-Regular.ttf", "LastResort.ttf")  # a box for every character
    install("DejaVuSerif.ttf", "b-sans.ttf")
    for name in ("a-serif.ttf", "c.ttf", "e-sans.ttf", "d-sans.ttf"):
        install("STIXGeneral.ttf", name)
    assert figures.fallback_fonts(of_one) == (str(tmp_path / "d-sans.ttf"),)
    assert figures.fallback_fonts(of_both) == (str(tmp_path / "d-sans.ttf"), str(tmp_path / "b-sans.ttf"))
    assert figures.fallback_fonts(NAME[0]) == ()


def test_a_damaged_font_is_passed_over(install, tmp_path):
    install("STIXGeneral.ttf", "a.ttf")
    (tmp_path / "a.ttf").write_bytes(b"no font")
    sign = min(signs("STIXGeneral.ttf"))
    assert as_text(sign) == sign.encode("unicode_escape").decode()
