"""Self-contained HTML pages: styles, script and pictures are inside, and nothing is asked of a network."""

import base64
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.runtime.text import printable

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> bytes:
    """A page from `utils/results/templates/<template>`; values are escaped where they are put in, whatever they hold.

    Names of files that are no text are written with backslashes. Raises jinja2's UndefinedError for a value that the
    template names and was not given.
    """
    return _environment().get_template(template).render(values).encode(errors="backslashreplace")


def render_markdown(template: str, **values: Any) -> bytes:
    """A Markdown page from `utils/results/templates/<template>`, as UTF-8.

    Values are not escaped: put foreign text through the filter `code`, which makes it a code span. Raises as `render`.
    """
    return _markdown_environment().get_template(template).render(values).encode(errors="backslashreplace")


def code_span(text: str) -> str:
    """Any text as a Markdown code span of one line; nothing in the text can end it."""
    shown = printable(text)
    return f"`` {shown.replace('``', '` `')} ``" if "`" in shown else f"`{shown}`"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _markdown_environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    return environment


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    """Bytes of a picture as the `src` of an <img>."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
