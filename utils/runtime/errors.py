"""Errors of the user, and the first line of any error."""


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
