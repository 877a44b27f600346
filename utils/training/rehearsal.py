"""Dry run before training: one batch through training and evaluation, a check of the disk, then all is restored."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.checkpoints import checkpoint
from utils.runtime import distributed
from utils.runtime.distributed import agreed
from utils.runtime.errors import UserError
from utils.runtime.files import prove_writable
from utils.runtime.progress import say
from utils.training.compiling import compile_failure
from utils.training.state import TrainingState, restore_rng_state

FULL_STATES = 2  # the newest, and the previous one, which is removed once the next is written


def rehearse(
    train: Callable[[], Any],
    evaluate: Callable[[], Any],
    training: TrainingState,
    *,
    batch_size: int,
    output_dir: Path,
    epochs_left: int,
    device: torch.device,
) -> None:
    """Train and evaluate one batch on each rank, prove that a checkpoint can be written, then restore everything.

    train, evaluate: the script's own passes over one batch. Raises UserError if the device's memory or the disk's
    space is too small, and if torch.compile fails, which it does at the first batch.
    """
    before = checkpoint.stage(training.take())
    rank = distributed.rank()
    try:
        train()
        evaluate()
    except torch.OutOfMemoryError:
        raise UserError(
            f"rank {rank}: {device} has too little memory for --batch-size {batch_size}; give a smaller one "
            "(with --grad-accum-steps the global batch can stay the same), or --amp."
        ) from None
    except Exception as error:
        problem = compile_failure(error)
        if problem is None:
            raise
        raise UserError(f"rank {rank}: {problem}") from None
    after = training.take()  # with what the optimisers allocate at their first step
    with agreed():
        if distributed.is_main_process():
            check_space(output_dir, after, epochs_left)
    for line in distributed.all_gather_object(f"rank {rank}: {_describe(device)}"):
        say(line)
    training.put_back(before, "rehearsal")
    restore_rng_state(before["rng"])


def check_space(output_dir: Path, state: dict[str, Any], epochs_left: int) -> None:
    """Raise UserError if a checkpoint cannot be written, or if the run's files will not fit on the disk."""
    data = checkpoint.serialize(state)
    prove_writable(output_dir, data)
    saved = [tensor for name in ("model", "model_ema") for tensor in state.get(name, {}).values()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    existing = sum((output_dir / name).exists() for name in (checkpoint.CHECKPOINT, checkpoint.PREVIOUS))
    needed = (FULL_STATES - existing) * len(data) + (epochs_left + 1) * weights
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"{output_dir}: has {free / 1e9:.2f} GB free, and the run will write {needed / 1e9:.2f} GB (checkpoints of "
            f"{len(data) / 1e9:.2f} GB, {epochs_left} files of weights); free space, or give another --output-dir."
        )
    say(
        f"one batch was trained and evaluated, then undone; a checkpoint has {len(data) / 1e6:.1f} MB, the run will "
        f"write {needed / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
    )


def _describe(device: torch.device) -> str:
    """The device and its memory."""
    if device.type == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"cpu, {total / 2**30:.1f} GiB of memory"
    used, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
    return f"{torch.cuda.get_device_name(device)}, {used / 2**30:.1f} of {total / 2**30:.1f} GiB used by one step"
