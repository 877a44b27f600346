"""A run's output folder: locked, taken over, and never shared with another run."""

import os
from pathlib import Path
from typing import Any

from utils.arguments import AUTO
from utils.checkpoints import checkpoint
from utils.results.log import read_log, write_log
from utils.runtime import distributed
from utils.runtime.distributed import agreed
from utils.runtime.errors import UserError
from utils.runtime.files import make_folder, remove_temporaries, write_atomically
from utils.runtime.progress import Position
from utils.runtime.reading import read_bytes
from utils.training import run_lock


def lock_output_dir(given: dict[str, Any]) -> None:
    """Lock the output folder on rank 0, before anything in it is read; not with --test-only.

    `begin_run` creates and locks a folder that does not exist yet. Raises UserError, on all ranks, if another run holds
    the lock.
    """
    resume = given.get("resume", AUTO)
    folder = Path(given.get("output_dir", "." if resume == AUTO else os.path.dirname(resume)))
    with agreed():
        if distributed.is_main_process() and not given.get("test_only") and os.path.isdir(folder):
            make_output_dir(folder)
            run_lock.acquire(folder)


def make_output_dir(output_dir: Path) -> None:
    """Create the folder on rank 0; raises UserError if it cannot be created or written to."""
    if not distributed.is_main_process():
        return
    make_folder(output_dir, "--output-dir")


def begin_run(output_dir: Path, script: str, resume: str | None, start: Position, epochs: int) -> None:
    """Take over and lock the output folder on rank 0, once all other checks have passed; cut its log to `start`.

    A run resumed into another folder takes its log, best model and checkpoint along. Raises UserError, before anything
    is written, if the folder holds another run, or if --epochs is less than what has already been trained.
    """
    from_scratch = resume in (None, AUTO)
    if start.epoch + (start.step > 0) > epochs:
        done = f"{start.epoch} epochs and {start.step} steps"
        raise UserError(f"--epochs {epochs}: {resume} has already trained {done}.")
    if not distributed.is_main_process():
        return
    source = None if from_scratch else Path(resume).parent
    moves = source is None or not output_dir.exists() or not source.samefile(output_dir)
    if source and moves:
        _refuse_live_source(source)
    log = read_log(source) if source else []
    make_output_dir(output_dir)
    run_lock.acquire(output_dir)
    if moves:
        _refuse_another_run(output_dir, resume)
    remove_temporaries(output_dir)
    if not moves and Path(resume).name == checkpoint.PREVIOUS:
        checkpoint.replace_damaged(output_dir, script)
    write_log(output_dir, [line for line in log if line["epoch"] < start.epoch])
    if source and moves:
        if (source / checkpoint.BEST).exists():
            write_atomically(output_dir / checkpoint.BEST, read_bytes(source / checkpoint.BEST, most=None))
        write_atomically(output_dir / checkpoint.CHECKPOINT, read_bytes(resume, most=None))


def _refuse_live_source(source: Path) -> None:
    """Raise UserError if the source run is still writing: checkpoint, log and best model would not match."""
    lock = run_lock.look_at(source)
    if lock.held:
        raise UserError(
            f"--resume: the run in {source} is still running ({lock.holder or 'by an unknown process'}). Stop it, or "
            "copy its checkpoint, log.jsonl and model_best.pth to another folder and resume from there."
        )


def _refuse_another_run(output_dir: Path, resume: str | None) -> None:
    """Raise UserError if the folder holds another run.

    Files of an earlier start that was killed before its first checkpoint here do not count: the best model, which
    --resume FILE copies first, and with --resume auto also the weights of epoch 0.
    """
    leftovers = set() if resume is None else {checkpoint.BEST}
    if resume == AUTO:
        leftovers.add("model_0.pth")
    names = (checkpoint.CHECKPOINT, checkpoint.PREVIOUS)
    for path in (*(output_dir / name for name in names), *output_dir.glob("model_*.pth")):
        if path.exists() and path.name not in leftovers:
            raise UserError(
                f"{path}: another run is there; continue it with --resume auto, or give another --output-dir."
            )
