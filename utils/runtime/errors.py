"""User errors: one sentence printed once, a non-zero exit code on every rank, no rank left waiting."""

from collections.abc import Iterator
from contextlib import contextmanager

from utils.runtime import distributed


class UserError(Exception):
    """Bad input, a full disk and the like. The message names the thing, what was expected, and what to do.

    agreed: every rank raises the same error at the same place, so rank 0 prints it for all.
    """

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def agreed() -> Iterator[None]:
    """Run a block that may fail on some ranks only; then all ranks raise the first UserError.

    The block must not contain collectives.
    """
    own_message = None
    try:
        yield
    except UserError as error:
        own_message = str(error)
    messages = [message for message in distributed.all_gather_object(own_message) if message is not None]
    if messages:
        raise UserError(messages[0], agreed=True)
