"""What both scripts do before their loops: where to start from, the output folder, the states to restore."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils import arguments
from utils.arguments import AUTO
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import NotDamaged, Weights
from utils.data.samplers import derive_seed
from utils.results.log import read_log, write_log
from utils.runtime import distributed, progress
from utils.runtime.errors import UserError, agreed
from utils.runtime.files import remove_temporaries, write_atomically
from utils.runtime.progress import Position
from utils.runtime.reading import read_bytes
from utils.runtime.text import printable
from utils.training import fitting as loading
from utils.training import monitor as events
from utils.training import run_lock
from utils.training.model_sources import OWN_WEIGHTS, is_source
from utils.training.state import restore_rng_state

PATHS = ("data_path", "exclude", "cache_dir")  # that a resumed run takes from its file unless they are given


class Start(NamedTuple):
    """The final arguments, and what the run starts from: a full state, weights only, or neither."""

    args: argparse.Namespace
    state: dict[str, Any] | None
    weights: Weights | None


def lock_output_dir(given: dict[str, Any]) -> None:
    """Lock the folder that the run will write to, on rank 0, before anything in it is read; not with --test-only.

    `begin_run` makes and locks one that does not exist yet. Raises UserError, on all ranks, if another run holds it.
    """
    resume = given.get("resume", AUTO)
    folder = Path(given.get("output_dir", "." if resume == AUTO else os.path.dirname(resume)))
    with agreed():
        if distributed.is_main_process() and not given.get("test_only") and os.path.isdir(folder):
            make_output_dir(folder)
            run_lock.acquire(folder)


def find_checkpoint(given: dict[str, Any], script: str) -> dict[str, Any]:
    """The given values with `--resume auto` replaced by the newest checkpoint of --output-dir, if there is one.

    Rank 0 looks, so that all ranks start from the same. --finetune or --weights beside it are for the first start
    only: `auto` stays where there is no checkpoint. Raises UserError if checkpoints are there, but no valid one.
    """
    if given.get("resume") != AUTO:
        return given
    found = None
    with agreed():
        if distributed.is_main_process():
            found = _newest_valid(Path(given.get("output_dir", ".")), script)
    found = distributed.broadcast_object(found)
    if found is None:
        return given
    first_only = () if given.get("test_only") else ("finetune", "weights")
    return {name: value for name, value in given.items() if name not in first_only} | {"resume": found}


def _newest_valid(output_dir: Path, script: str) -> str | None:
    newest, previous = output_dir / checkpoint.CHECKPOINT, output_dir / checkpoint.PREVIOUS
    try:
        if newest.exists():
            checkpoint.read_checkpoint(newest, script)
            return str(newest)
    except NotDamaged:
        raise
    except UserError as error:
        if not previous.exists():
            raise
        progress.say(f"{error} Trying {previous}.")
    if not previous.exists():
        return None
    checkpoint.read_checkpoint(previous, script)
    return str(previous)


def choose_start(parser: arguments.Parser, given: dict[str, Any], script: str) -> Start:
    """Scratch, --resume, --finetune or --test-only; raises UserError for a contradiction or an unfit file."""
    resume, finetune = given.get("resume"), given.get("finetune")
    if resume == AUTO:
        if given.get("test_only"):
            raise UserError(f"--resume auto: no checkpoint to test in {given.get('output_dir', '.')}.")
        resume = None
    if resume and finetune:
        raise UserError("--resume and --finetune: one goes on with a run, the other starts a new one; give one.")
    if (resume or finetune) and given.get("weights"):
        raise UserError(f"--weights {given['weights']}: the weights already come from {resume or finetune}.")
    test_only = given.get("test_only", False)
    if finetune or (resume and test_only):
        weights = checkpoint.read_weights(resume or finetune, given.get("use_ema"))
        for note in weights.notes:
            progress.say(note)
        saved = loading.usable_args(weights, given, progress.say)
        args = arguments.for_weights(parser, given, saved, weights.path, test_only=test_only)
        report_paths(args, given, weights.path)
        if weights.classes is None:
            _report_foreign_args(args, given, saved, weights.path)
        start = Start(args, None, weights)
    elif resume:
        state = checkpoint.read_checkpoint(resume, script)
        args = arguments.for_resume(parser, given, state["args"], resume)
        report_paths(args, given, resume)
        start = Start(args, state, None)
    else:
        args = arguments.for_fresh_start(parser, given)
        _report_random_weights(args)
        start = Start(args, None, None)
    if start.args.tensorboard and not test_only:
        events.check_installed()
    return start


def _report_random_weights(args: argparse.Namespace) -> None:
    """Print that a name with a tag, or of the hub, brings no weights along."""
    name = args.model
    if args.weights is None and is_source(name):
        progress.say(f"--model {name}: the weights are random; --weights {OWN_WEIGHTS} starts from its own.")
    elif args.weights is None and "." in name:
        tag = name.split(".", 1)[1]
        progress.say(f"--model {name}: the weights are random; --weights {tag} starts from those of the tag.")
    policy = args.policy_model if getattr(args, "mask_policy", None) == "learned" else ""
    if is_source(policy) or "." in policy:
        progress.say(f"--policy-model {policy}: the policy's weights are random; those of the name are not loaded.")


def report_paths(
    args: argparse.Namespace, given: dict[str, Any], source: str, report: Callable[[str], None] = progress.say
) -> None:
    """Report which paths of a resumed run come from its file, which may be somebody else's or of another machine."""
    taken = [name for name in PATHS if name not in given and getattr(args, name) is not None]
    models = [name for name in ("model", "policy_model") if is_source(getattr(args, name, ""))]
    taken += [name for name in models if name not in given]
    if taken:
        flags = " ".join(arguments.typed(name, getattr(args, name)) for name in taken)
        report(printable(f"{source}: paths taken from this file: {flags}"))


def _report_foreign_args(args: argparse.Namespace, given: dict[str, Any], saved: dict[str, Any], path: str) -> None:
    """Print which flags come from a file of other code, and which of the preprocessing are assumed."""
    names = [name for name in arguments.MODEL_FLAGS if name in saved and name not in given]
    taken = [arguments.typed(name, saved[name]) for name in names if getattr(args, name, None) == saved[name]]
    if taken:
        progress.say(printable(f"{path}: used of its arguments: {' '.join(taken)}"))
    loading.report_preprocessing(args, given, saved, path, progress.say)


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


def begin_run(output_dir: Path, script: str, resume: str | None, start: Position, epochs: int) -> None:
    """Claim and lock the folder for this run, on rank 0, when nothing else can fail: its log up to the start's epoch.

    A run resumed into another folder takes its log, its best model and its checkpoint along. Raises UserError, before
    anything is written, where another run is there or fewer epochs are asked for than are begun.
    """
    afresh = resume in (None, AUTO)
    if start.epoch + (start.step > 0) > epochs:
        done = f"{start.epoch} epochs and {start.step} steps"
        raise UserError(f"--epochs {epochs}: {resume} has {done} behind it already.")
    if not distributed.is_main_process():
        return
    source = None if afresh else Path(resume).parent
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
    """Raise UserError if the run to take over still writes: checkpoint, log and best model would not fit together."""
    lock = run_lock.look_at(source)
    if lock.held:
        raise UserError(
            f"--resume: the run in {source} is still running ({lock.holder or 'by an unknown process'}). Stop it, or "
            "copy the checkpoint to another folder and resume from the copy."
        )


def _refuse_another_run(output_dir: Path, resume: str | None) -> None:
    """Raise UserError if a run is there, but for what a start leaves that is killed before its first checkpoint."""
    leftovers = {None: set(), AUTO: {"model_0.pth", checkpoint.BEST}}.get(resume, {checkpoint.BEST})
    names = (checkpoint.CHECKPOINT, checkpoint.PREVIOUS)
    for path in (*(output_dir / name for name in names), *output_dir.glob("model_*.pth")):
        if path.exists() and path.name not in leftovers:
            raise UserError(f"{path}: another run is there; go on with it by --resume, or give another --output-dir.")


def restore_generators(state: dict[str, Any] | None, seed: int) -> None:
    """Give each rank its own random numbers: as the checkpoint left them, or a fresh stream of (seed, rank)."""
    kind = "GPUs" if torch.cuda.is_initialized() else "CPU processes"
    if state is not None:
        saved_kind = "GPUs" if all("cuda" in of_rank for of_rank in state["rng"]) else "CPU processes"
        if (len(state["rng"]), saved_kind) == (distributed.world_size(), kind):
            restore_rng_state(state["rng"])
            return
        progress.say(
            f"The checkpoint is of {len(state['rng'])} {saved_kind}, and now there are {distributed.world_size()} "
            f"{kind}: the run goes on from the same weights and the same place in the data, but with other global "
            "batches and masks, so not bit for bit."
        )
    start = Position.of(state)
    torch.manual_seed(derive_seed("process", seed, distributed.rank(), start.epoch, start.step))
