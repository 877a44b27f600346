"""What a run leaves behind: full states within and after each epoch, weights, log.jsonl and status.json."""

import copy
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from utils.checkpoints import checkpoint
from utils.data.loaders import TIMEOUT, batch_seconds
from utils.results.log import append_log
from utils.results.metrics import Metrics, format_metrics
from utils.results.run_folder import BAD_BATCH, STATUS
from utils.runtime import distributed, progress
from utils.runtime.errors import UserError, agreed
from utils.runtime.files import write_json
from utils.runtime.processes import lost_contact
from utils.runtime.progress import Position
from utils.runtime.reading import read_json
from utils.runtime.signals import ALONE_SECONDS, TOGETHER_SECONDS, Interrupted, StopRequest, WaitEnded
from utils.training import run_lock
from utils.training.state import TrainingState
from utils.training.update import ADVICE, NonFiniteLoss, StepGuard

Item = TypeVar("Item")


class Saver:
    """Saves the run every `checkpoint_steps` steps, after each epoch, and when a signal asks it to stop.

    To be entered round the training: status.json then says running, interrupted, finished or failed. All methods are
    called by all ranks, and rank 0 writes; if it cannot, all raise its UserError, and the run stops.
    """

    def __init__(
        self,
        output_dir: Path,
        training: TrainingState,
        *,
        origin: dict[str, Any],
        start: Position,
        best_f1: float,
        checkpoint_steps: int | None,
        timeout: float = TIMEOUT,
    ) -> None:
        """origin: what the run began with (script, classes, images, args), which goes into the files as it is.

        timeout: seconds that a process may wait, for a batch too.
        """
        self.batch_seconds = batch_seconds(timeout)
        self.output_dir, self.training, self.meters = output_dir, training, training.meters
        self.origin = origin
        self.position, self.best_f1, self.checkpoint_steps = start, best_f1, checkpoint_steps
        self.saved = start  # what status.json tells; known to rank 0
        self.stop = StopRequest()

    def idle(self) -> "Saver":
        """One that never saves and hears no signal, for a pass that is to be undone."""
        idle = copy.copy(self)
        idle.position, idle.checkpoint_steps, idle.stop = Position(self.position.epoch), None, StopRequest()
        return idle

    def __enter__(self) -> "Saver":
        with agreed():
            if distributed.is_main_process():
                self._write_status("running", "")
        self.lock_holder = distributed.broadcast_object(run_lock.look_at(self.output_dir).holder)
        self.stop.__enter__()
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: TracebackType | None) -> None:
        self.stop.__exit__()
        if error is None:
            with agreed():
                if distributed.is_main_process():
                    self._write_status("finished", "")
        elif not isinstance(error, Interrupted) and _speaks(error):  # an interruption was noted with its checkpoint
            with suppress(UserError):  # on a full disk, say; what matters is the first error
                if isinstance(error, NonFiniteLoss):
                    write_json(self.output_dir / BAD_BATCH, error.batch)
                    progress.say(f"{self.output_dir / BAD_BATCH}: the images of that batch.")
                if not distributed.is_lost_contact(error):
                    self._write_status("failed", str(error) or type(error).__name__)
                elif self._is_running():  # otherwise the rank that failed has said why
                    self._write_status("failed", lost_contact(error))

    def after_step(self, position: Position, guard: StepGuard) -> None:
        """Save if it is due; raises Interrupted, on all ranks after the same step, once a signal came to any."""
        self.position = position
        stop = guard.stop_agreed()
        if stop or (self.checkpoint_steps is not None and position.step % self.checkpoint_steps == 0):
            guard.raise_if_found(position.epoch)
            self._save(stop)

    def wait_for_batch(self, get: Callable[[], Item], guard: StepGuard | None = None) -> Item:
        """Returns `get()`, a loader's next batch; raises WaitEnded if it takes too long. A signal ends the wait too.

        A single process then saves the last step and raises Interrupted. Of several, the others wait in a collective,
        so nothing can be saved: if the batch does not come soon, UserError.
        """
        single = distributed.world_size() == 1
        try:
            return self.stop.wait_for(get, self.batch_seconds, ALONE_SECONDS if single else TOGETHER_SECONDS)
        except WaitEnded:
            if self.stop.asked is None:
                raise
        if not single:
            raise UserError(
                f"rank {distributed.rank()}: {self.stop.asked} came, and no batch for {TOGETHER_SECONDS} seconds after "
                "it, so the run ends without a new checkpoint; the last one, if there is one, is unharmed."
            )
        if guard is not None:
            guard.raise_if_found(self.position.epoch)
        self._save(stop=True)
        raise AssertionError  # not reached

    def stop_if_asked(self) -> None:
        """Between steps, where all ranks are: as `after_step`, but only for a signal."""
        if any(distributed.all_gather_object(self.stop.asked is not None)):
            self._save(stop=True)

    def finish_epoch(
        self,
        results: dict[str, Metrics],
        line: dict[str, Any],
        show: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Print the epoch's metrics; write model_<epoch>.pth, model_best.pth if it is, the log line and the checkpoint.

        results: the metrics of `val`, and with --model-ema those of the average, `val_ema`, which then decides which
        epoch is the best. A kill in between leaves the last checkpoint; resumed from it, the same files are written
        again. show: called last, on rank 0 with the log line: were it to kill the process, the epoch would be done all
        the same. Raises UserError, before anything is written, for a val loss or a weight that is not finite.
        """
        epoch = self.position.epoch
        if any(metrics["loss"] is None for metrics in results.values()):
            raise UserError(
                f"the loss on val after epoch {epoch} is not finite, so this epoch was not saved; the last checkpoint, "
                f"if there is one, is unharmed. {ADVICE}",
                agreed=True,
            )
        decisive = "val_ema" if "val_ema" in results else "val"
        f1 = results[decisive]["f1"]
        is_best, self.best_f1 = f1 > self.best_f1, max(f1, self.best_f1)
        for name, metrics in results.items():
            best = "  (best)" if is_best and name == decisive else ""
            progress.say(f"epoch {epoch}, {name}: {format_metrics(metrics)}{best}")
        self.position = Position(epoch + 1)
        self.meters.reset()
        state = self._state()
        average = self.training.ema.model if self.training.ema else None
        weights = checkpoint.weights_state(
            self.training.modules["model"], self.origin["classes"], self.origin["args"], average
        )
        with agreed():
            if distributed.is_main_process():
                self._check_finite()
                checkpoint.save(self.output_dir / f"model_{epoch}.pth", weights)
                if is_best:
                    checkpoint.save(self.output_dir / checkpoint.BEST, weights)
                for name, metrics in results.items():
                    line = line | {f"{name}_{key}": value for key, value in metrics.items()}
                append_log(self.output_dir, line)
                self._save_checkpoint(state, "running", "")
                if show is not None:
                    show(line)

    def _state(self) -> dict[str, Any]:
        return {
            "format_version": checkpoint.FORMAT_VERSION,
            **self.origin,
            **self.position._asdict(),
            "best_f1": self.best_f1,
            **self.training.take(),
        }

    def _save(self, stop: bool) -> None:
        """Write the checkpoint; then, if the run is to stop, raise Interrupted."""
        state = self._state()
        names = [name for name in distributed.all_gather_object(self.stop.asked) if name] if stop else []
        message = f"{names[0]}: stopped" if names else ""
        with agreed():
            if distributed.is_main_process():
                self._check_finite()
                self._save_checkpoint(state, "interrupted" if stop else "running", message)
        if stop:
            raise Interrupted(
                f"{names[0]}: stopped after {self.position.step} steps of epoch {self.position.epoch}; "
                f"{self.output_dir / checkpoint.CHECKPOINT} is saved, and --resume goes on from there."
            )

    def _check_finite(self) -> None:
        """Raise UserError for weights that are not finite: a gradient can overflow where no loss shows it."""
        name = self.training.first_not_finite()
        if name is not None:
            raise UserError(
                f"{name} is not finite after {self.position.step} steps of epoch {self.position.epoch}, so this was "
                f"not saved; the last checkpoint, if there is one, is unharmed. {ADVICE}"
            )

    def _save_checkpoint(self, state: dict[str, Any], status: str, message: str) -> None:
        checkpoint.save_checkpoint(self.output_dir, state)
        self.saved = self.position
        self._write_status(status, message)

    def _is_running(self) -> bool:
        """Whether status.json says so of this start; by now another one may have taken the folder over."""
        if run_lock.look_at(self.output_dir).holder not in (None, self.lock_holder):
            return False
        with suppress(OSError, ValueError, TypeError, KeyError):
            return read_json(self.output_dir / STATUS)["status"] == "running"
        return False

    def _write_status(self, status: str, message: str) -> None:
        content = {"status": status, "epoch": self.saved.epoch, "step": self.saved.step, "message": message}
        content["time"] = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(self.output_dir / STATUS, content)


def _speaks(error: BaseException) -> bool:
    """True if this rank is the one, or one of those, to tell of the error."""
    if isinstance(error, UserError):
        return distributed.is_main_process() or not error.agreed
    return not distributed.failure_posted()
