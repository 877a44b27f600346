"""Sentences for what a node refuses (file handles, processes, shared memory), and for workers that end or hang."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from utils.runtime import distributed

SHARED_MEMORY = Path("/dev/shm")  # where loader workers put their batches
PREFETCH = 2  # batches that each loader worker has ready or in work; torch's default
TOO_MANY_FILES = (
    "too many open files for this process: raise the limit in the shell that starts the run (ulimit -n 65536), or give "
    "fewer --workers."
)
NO_PROCESS = (
    "the system refuses to start another process or thread ({reason}): give fewer --workers, or raise the limit "
    "(ulimit -u in the shell, pids.max of a container, the node's memory)."
)
MORE_SHARED_MEMORY = "give fewer --workers, or more shared memory (docker run --ipc=host, or --shm-size=16g)"


def explain(error: BaseException) -> str | None:
    """One sentence, with what to do, for an error that one of these limits caused; None for any other error."""
    errors = list(_chain(error))
    texts = [str(each) for each in errors]
    rank = _rank()
    numbers = {each.errno for each in errors if isinstance(each, OSError)}
    everything = "\n".join(texts)
    if numbers & {errno.EMFILE, errno.ENFILE} or _has(everything, "Too many open files", "items of ancdata"):
        return rank + TOO_MANY_FILES
    if "shared memory" in everything and _has(everything, "No space left", "unable to allocate"):
        return f"{rank}{SHARED_MEMORY} is full{_free_text()}: {MORE_SHARED_MEMORY}."
    for text in texts:
        first_line = text.split("\n")[0].strip().rstrip(".")
        if first_line.startswith("DataLoader worker (pid"):
            return f"{rank}{first_line}: {_advice_on_death(first_line)}."
        if "can't start new thread" in text:
            return rank + NO_PROCESS.format(reason=first_line)
    return None


def explain_start(error: BaseException) -> str | None:
    """As `explain`, for an error while processes were started."""
    if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):
        return _rank() + NO_PROCESS.format(reason=os.strerror(error.errno))
    return explain(error)


def explain_batch(error: BaseException) -> str | None:
    """As `explain`, for an error while a batch was taken from a worker; a worker that ends breaks the connection."""
    broken = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    if broken and not str(error).startswith("Caught "):  # by torch, in a worker's own code
        return f"{_rank()}DataLoader worker ended while its batch was read: {_advice_on_death('Killed')}."
    return explain(error)


def no_batch(time: str) -> str:
    """The sentence for loader workers that gave nothing for this time."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"{_rank()}no batch came from the loader's workers within {time}: a worker hangs, the storage does not answer, "
        f"{SHARED_MEMORY} is full{_free_text()}, or file handles run out (ulimit -n {files}); a training with slow "
        "storage needs a larger --timeout."
    )


def _rank() -> str:
    return f"rank {distributed.launched_rank()}: " if distributed.launched_world_size() > 1 else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from or over."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _has(text: str, *parts: str) -> bool:
    return any(part in text for part in parts)


def _advice_on_death(reason: str) -> str:
    if "Bus error" in reason:
        return f"{SHARED_MEMORY} is full{_free_text()}; {MORE_SHARED_MEMORY}"
    if "Killed" in reason or "exited unexpectedly" in reason:
        return "somebody ended it, or the node's memory is used up; give fewer --workers"
    return "a fault in a library, or of the node; --workers 0 loads without workers"


def free_shared_memory() -> int | None:
    """The bytes that are free for loader workers' batches; None where there is no such limit."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None  # 0 blocks: a tmpfs without a limit


def _free_text() -> str:
    free = free_shared_memory()
    return "" if free is None else f" ({free / 1e6:.0f} MB free)"


def shared_memory_problem(batch_bytes: int, batches: int, workers: int, processes: int) -> str | None:
    """Why /dev/shm is too small for what the loader workers of a node hold ready, and what fits; None if it suffices.

    batches: of a pass, of each of the `processes`; workers: of each. One more batch is in use.
    """
    free = free_shared_memory()
    needed = processes * (min(PREFETCH * workers, batches) + 1) * batch_bytes
    if workers == 0 or free is None or needed <= free:
        return None
    fitting = max(0, (free // (processes * batch_bytes) - 1) // PREFETCH)
    return (
        f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, and the loader workers of this node can hold "
        f"{needed / 1e6:.0f} MB of batches there ({processes} x {workers} workers, {PREFETCH} batches of "
        f"{batch_bytes / 1e6:.1f} MB each): give --workers {fitting}, or more shared memory (docker run --ipc=host, or "
        "--shm-size=16g)."
    )
