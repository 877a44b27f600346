"""Messages for a node's limits (file handles, processes, shared memory) and for loader workers that end or hang."""

import errno
import os
import resource
from pathlib import Path

from utils.runtime.launch import current_launch

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
MORE_SHARED_MEMORY = "or more shared memory (docker run --ipc=host, or --shm-size=16g)"


def explain(error: BaseException) -> str | None:
    """One sentence with advice for an error that one of these limits caused; None for any other error."""
    errors, cause = [], error
    while cause is not None:
        errors.append(cause)
        cause = cause.__cause__ or cause.__context__
    texts = list(map(str, errors))
    everything = "\n".join(texts)
    numbers = {cause.errno for cause in errors if isinstance(cause, OSError)}
    no_handle = "Too many open files" in everything or "items of ancdata" in everything
    if no_handle or numbers & {errno.EMFILE, errno.ENFILE}:
        return _rank() + TOO_MANY_FILES
    no_room = "No space left" in everything or "unable to allocate" in everything
    if no_room and "shared memory" in everything:
        return f"{_rank()}{_shared_memory_full()}: give fewer --workers, {MORE_SHARED_MEMORY}."
    for text in texts:
        first_line = text.split("\n")[0].strip().rstrip(".")
        if first_line.startswith("DataLoader worker (pid"):
            return f"{_rank()}{first_line}: {_advice_on_death(first_line)}."
        if "can't start new thread" in text:
            return _rank() + NO_PROCESS.format(reason=first_line)
    return None


def explain_start(error: BaseException) -> str | None:
    """As `explain`, for an error in starting processes."""
    if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):
        return _rank() + NO_PROCESS.format(reason=os.strerror(error.errno))
    return explain(error)


def explain_batch(error: BaseException) -> str | None:
    """As `explain`, for an error in taking a batch from a worker: a worker that ends breaks the connection."""
    broken = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    if broken and not str(error).startswith("Caught "):  # torch's word for an error in the worker's own code
        return f"{_rank()}DataLoader worker ended while its batch was read: {_advice_on_death('Killed')}."
    return explain(error)


def no_batch(time: str) -> str:
    """The message when loader workers delivered nothing for this time."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"{_rank()}no batch came from the loader's workers within {time}: a worker hangs, the storage does not answer, "
        f"{_shared_memory_full()}, or file handles run out (ulimit -n {files}); slow storage needs a larger --timeout."
    )


def _rank() -> str:
    launch = current_launch()
    return f"rank {launch.rank}: " if launch.world_size > 1 else ""


def _advice_on_death(reason: str) -> str:
    if "Bus error" in reason:
        return f"{_shared_memory_full()}; give fewer --workers, {MORE_SHARED_MEMORY}"
    if "Killed" in reason or "exited unexpectedly" in reason:
        return "it was killed, or the node's memory is used up; give fewer --workers"
    return "a fault in a library or of the node; --workers 0 loads without workers"


def free_shared_memory() -> int | None:
    """The free bytes for loader workers' batches; None where there is no such limit."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None  # 0 blocks: a tmpfs without a limit


def _shared_memory_full() -> str:
    free = free_shared_memory()
    return f"{SHARED_MEMORY} is full" + ("" if free is None else f" ({free / 1e6:.0f} MB free)")


def shared_memory_problem(batch_bytes: int, batches: int, workers: int, processes: int) -> str | None:
    """Why /dev/shm is too small for the batches that a node's loader workers hold, and what fits; None if it suffices.

    batches: per pass and process; workers: per process. Each process also has one more batch in use.
    """
    free = free_shared_memory()
    needed = processes * (min(PREFETCH * workers, batches) + 1) * batch_bytes
    if workers == 0 or free is None or needed <= free:
        return None
    fitting = max(0, (free // (processes * batch_bytes) - 1) // PREFETCH)
    return (
        f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, and the loader workers of this node can hold "
        f"{needed / 1e6:.0f} MB of batches there ({processes} x {workers} workers, {PREFETCH} batches of "
        f"{batch_bytes / 1e6:.1f} MB each): give --workers {fitting}, {MORE_SHARED_MEMORY}."
    )
