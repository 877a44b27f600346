"""The images that `--bad-images skip` leaves out: counted over all ranks, each said once, and too many end the run."""

from collections.abc import Iterable

from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.progress import say


class BadImages:
    """What cannot be read, as `read_image` says it; with `limit` None nothing is skipped, and nothing done here."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._met: set[str] = set()  # by this rank
        self._known: set[str] = set()  # to all ranks

    @property
    def count(self) -> int:
        """The bad images of all ranks, up to the last `share`."""
        return len(self._known)

    def note(self, messages: Iterable[str]) -> None:
        """Take in what this rank has met; an image met before does not count again."""
        self._met.update(messages)

    def say_count(self) -> None:
        """At the end: how many there were, if any."""
        if self.count:
            say(f"{self.count} images could not be read and were skipped; they are named above.")

    def share(self) -> None:
        """Tell all ranks of each other's bad images; rank 0 says the new ones. A collective, but without a limit none.

        Raises UserError, on all ranks at once, if more than `limit` are known.
        """
        if self.limit is None:
            return
        met = set().union(*distributed.all_gather_object(self._met - self._known))
        new = sorted(met - self._known)
        for message in new[: max(0, self.limit + 1 - self.count)]:
            say(f"--bad-images skip: {message}")
        self._known.update(new)
        if self.count > self.limit:
            raise UserError(
                f"{self.count} images cannot be read, more than --max-bad-images {self.limit}; replace or remove those "
                "named above, or allow more.",
                agreed=True,
            )
