"""Tables in GitHub Markdown."""

from collections.abc import Iterable, Sequence

from utils.runtime.text import printable

NONE = "\N{EN DASH}"  # the cell of a missing value


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table; all columns except the first `texts` are right-aligned."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    cells = ([printable(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
