"""What both scripts do round their loops: where to start from, the output folder, the end of an epoch."""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from utils import arguments, checkpoint, distributed, progress
from utils.checkpoint import Weights
from utils.data import derive_seed
from utils.errors import UserError, agreed
from utils.evaluation import format_metrics
from utils.metrics import Metrics
from utils.optim import GuardedUpdate, MovingAverage


class Start(NamedTuple):
    """The final arguments, and what the run starts from: a full state, weights only, or neither."""

    args: argparse.Namespace
    state: dict[str, Any] | None
    weights: Weights | None


def choose_start(parser: arguments.Parser, given: dict[str, Any], script: str) -> Start:
    """Scratch, --resume, --finetune or --test-only; raises UserError for a contradiction or an unfit file."""
    resume, finetune = given.get("resume"), given.get("finetune")
    if resume and finetune:
        raise UserError("--resume and --finetune: one goes on with a run, the other starts a new one; give one.")
    if (resume or finetune) and given.get("weights"):
        raise UserError(f"--weights {given['weights']}: the weights already come from {resume or finetune}.")
    test_only = given.get("test_only", False)
    if finetune or (resume and test_only):
        weights = checkpoint.read_weights(resume or finetune)
        args = arguments.for_weights(parser, given, weights.args, weights.path, test_only=test_only)
        return Start(args, None, weights)
    if resume:
        state = checkpoint.read_checkpoint(resume, script)
        return Start(arguments.for_resume(parser, given, state["args"], resume), state, None)
    return Start(arguments.for_fresh_start(parser, given), None, None)


def make_output_dir(output_dir: Path) -> None:
    """Make the folder, on rank 0; raises UserError if it cannot be made or written to."""
    if not distributed.is_main_process():
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be made ({error.strerror}).") from None
    if not os.access(output_dir, os.W_OK):
        raise UserError(f"--output-dir {output_dir}: no permission to write there.")


def begin_run(output_dir: Path, resume: str | None, first_epoch: int, epochs: int) -> None:
    """Claim the folder for this run, on rank 0, when nothing else can fail any more: its log up to `first_epoch`.

    A run resumed into another folder takes its log and its best model along. Raises UserError, before anything is
    written, where another run is there or fewer epochs are asked for than are done.
    """
    if first_epoch > epochs:
        raise UserError(f"--epochs {epochs}: {resume} has {first_epoch} epochs behind it already.")
    if not distributed.is_main_process():
        return
    source = Path(resume).parent if resume else None
    moves = source is None or not output_dir.exists() or not source.samefile(output_dir)
    if moves:
        names = (checkpoint.CHECKPOINT, checkpoint.PREVIOUS)
        for path in (*(output_dir / name for name in names), *output_dir.glob("model_*.pth")):
            if path.exists():
                raise UserError(
                    f"{path}: another run is there; go on with it by --resume, or give another --output-dir."
                )
    log = progress.read_log(source) if source else []
    make_output_dir(output_dir)
    progress.write_log(output_dir, [line for line in log if line["epoch"] < first_epoch])
    if source and moves and (source / checkpoint.BEST).exists():
        shutil.copyfile(source / checkpoint.BEST, output_dir / checkpoint.BEST)


def restore_generators(state: dict[str, Any] | None, seed: int) -> None:
    """Give each rank its own random numbers: as the checkpoint left them, or a fresh stream of (seed, rank)."""
    if state is not None and len(state["rng"]) == distributed.world_size():
        checkpoint.restore_rng_state(state["rng"][distributed.rank()])
        return
    if state is not None:
        progress.say(
            f"The checkpoint is of {len(state['rng'])} processes, and now there are {distributed.world_size()}: the "
            "run goes on from the same weights, but with other batches and masks, so not bit for bit."
        )
    first_epoch = 0 if state is None else state["epoch"]
    torch.manual_seed(derive_seed("process", seed, distributed.rank(), first_epoch))


def load_training_state(state: dict[str, Any], update: GuardedUpdate, ema: MovingAverage | None, source: str) -> None:
    """Restore optimisers, scaler and moving average; raises UserError if they are not those of the checkpoint."""
    update.load_state(state, source)
    if ema is not None:
        ema.load_state(state)


def finish_epoch(
    output_dir: Path,
    state: dict[str, Any],
    evaluated: nn.Module,
    metrics: Metrics,
    line: dict[str, Any],
    is_best: bool,
) -> None:
    """Say how the epoch went; write model_<epoch>.pth, model_best.pth if it is, the log line and the checkpoint.

    A kill in between leaves the last checkpoint; resumed from it, the same files are written again. If rank 0 cannot
    write, all ranks raise its UserError; likewise, before anything is written, for a val loss that is not finite.
    """
    epoch = state["epoch"] - 1
    if metrics["loss"] is None:
        raise UserError(
            f"the loss on val after epoch {epoch} is not finite, so this epoch was not saved; the last checkpoint, if "
            "there is one, is unharmed. Lower --lr, or give --clip-grad-norm.",
            agreed=True,
        )
    progress.say(f"epoch {epoch}, val: {format_metrics(metrics)}{'  (best)' if is_best else ''}")
    weights = checkpoint.weights_state(evaluated, state["classes"], state["args"])
    with agreed():
        if distributed.is_main_process():
            checkpoint.save(output_dir / f"model_{epoch}.pth", weights)
            if is_best:
                checkpoint.save(output_dir / checkpoint.BEST, weights)
            progress.append_log(output_dir, line | {f"val_{name}": value for name, value in metrics.items()})
            checkpoint.save_checkpoint(output_dir, state)
