"""Self-contained HTML pages: styles, script and pictures are inside, and nothing is asked of a network."""

import base64
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> bytes:
    """A page from `utils/results/templates/<template>`; values are escaped where they are put in, whatever they hold.

    Names of files that are no text are written with backslashes. Raises jinja2's UndefinedError for a value that the
    template names and was not given.
    """
    return _environment().get_template(template).render(values).encode(errors="backslashreplace")


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    """Bytes of a picture as the `src` of an <img>."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
