"""HTML pages and Markdown files from utils/results/templates. Pages are self-contained: styles, script and pictures."""

import base64
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.runtime.text import printable

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> bytes:
    """An HTML page in UTF-8 from a template; all values are escaped. File names that are not text get backslashes.

    Raises jinja2's UndefinedError for a value that the template uses and was not given.
    """
    return _environment(html=True).get_template(template).render(values).encode(errors="backslashreplace")


def render_markdown(template: str, **values: Any) -> bytes:
    """A Markdown file in UTF-8 from a template; the template passes foreign text through the filter `code`.

    Raises as `render`.
    """
    return _environment(html=False).get_template(template).render(values).encode(errors="backslashreplace")


@cache
def _environment(html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
    environment.filters["code"] = code_span
    environment.filters["three_digits"] = three_digits
    return environment


def code_span(text: str) -> str:
    """Any text as a Markdown code span on one line, which nothing in the text can end."""
    shown = printable(text)
    return f"`` {shown.replace('``', '` `')} ``" if "`" in shown else f"`{shown}`"


def three_digits(value: Any) -> str:
    """A number with three significant digits, such as "0.0312", "1.00" and "5,312"; a dash for anything else."""
    if type(value) not in (int, float):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:#.3g}"


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    """The bytes of a picture as the `src` of an <img>."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
