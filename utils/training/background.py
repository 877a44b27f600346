"""One write at a time in a thread, so that training goes on meanwhile."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWrite:
    """A function that runs in a thread; the next one starts only after it has ended."""

    def __init__(self, failed: Callable[[], None]) -> None:
        """failed: called in the thread if the function raises."""
        self.failed = failed
        self._pending: Future | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Start `write` after waiting for the one before. Raises what that one raised."""
        self.wait()
        executor = ThreadPoolExecutor(1)  # a thread for each write, so that usually none runs when loaders fork workers
        self._pending = executor.submit(self._run, write)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Wait for the write that was started last, if any; raises what it raised, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException:
            self.failed()
            raise
