"""What the user must mend: one clear sentence, printed once, a non-zero exit on every rank, no rank left waiting."""

from collections.abc import Iterator
from contextlib import contextmanager

from utils.runtime import distributed


class UserError(Exception):
    """Bad input, a full disk, and the like; the message names the thing, what was expected, and what to do.

    `agreed` is set when every rank raises the same error at the same place, so that rank 0 may speak for all.
    """

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


@contextmanager
def agreed() -> Iterator[None]:
    """Run a block without collectives that may fail on some ranks only; if one fails, all raise its UserError."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = [found for found in distributed.all_gather_object(problem) if found is not None]
    if problems:
        raise UserError(problems[0], agreed=True)
