"""Saves a run: full states within and after each epoch, weights, log.jsonl and status.json."""

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
from utils.runtime.distributed import agreed
from utils.runtime.errors import UserError
from utils.runtime.files import write_json
from utils.runtime.processes import lost_contact
from utils.runtime.progress import Position
from utils.runtime.reading import read_json
from utils.runtime.signals import ALONE_SECONDS, TOGETHER_SECONDS, Interrupted, StopRequest, WaitEnded
from utils.training import run_lock
from utils.training.background import BackgroundWrite
from utils.training.state import TrainingState
from utils.training.update import ADVICE, NonFiniteLoss, StepGuard

Item = TypeVar("Item")


class Saver:
    """Saves the run every `checkpoint_steps` steps, after each epoch, and when a signal asks it to stop.

    A context manager around training: it keeps status.json at running, interrupted, finished or failed. All ranks call
    all methods and rank 0 writes, in a thread and one save at a time, from a copy of the state in host memory. If it
    cannot write, all ranks raise its UserError after the next step, and the run stops.
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
        keep_best: bool = True,
    ) -> None:
        """origin: script, classes, images and arguments of the run, stored in its files unchanged.

        timeout: the longest wait of a process, also for a batch, in seconds. keep_best: write model_best.pth; not for
        a classifier that trains on masked images, because `val` has clean ones.
        """
        self.batch_seconds = batch_seconds(timeout)
        self.output_dir, self.training, self.meters = output_dir, training, training.meters
        self.origin = origin
        self.position, self.best_f1, self.checkpoint_steps = start, best_f1, checkpoint_steps
        self.keep_best = keep_best
        self.saved = start  # the position in status.json; up to date on rank 0 only
        self.stop = StopRequest()
        self.writing = BackgroundWrite(failed=self._ask_to_stop)
        self.last_call: Callable[[bool], None] | None = None  # when the block ends; argument: whether it failed

    def idle(self) -> "Saver":
        """A copy that never saves and ignores signals, for the rehearsal."""
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
        try:
            self._record_end(error)
        finally:
            if self.last_call is not None:
                self.last_call(error is not None)

    def _record_end(self, error: BaseException | None) -> None:
        try:
            with agreed() if error is None else suppress(Exception):  # the first error matters more
                self.writing.wait()
        except Exception as late:
            self._record_end(late)
            raise
        self.stop.__exit__()
        if error is None:
            with agreed():
                if distributed.is_main_process():
                    self._write_status("finished", "")
        elif not isinstance(error, Interrupted) and _should_report(error):  # interruptions are already recorded
            with suppress(UserError):  # such as a full disk: the first error matters more
                if isinstance(error, NonFiniteLoss):
                    write_json(self.output_dir / BAD_BATCH, error.batch)
                    progress.say(f"{self.output_dir / BAD_BATCH}: the images of that batch.")
                if not distributed.is_lost_contact(error):
                    self._write_status("failed", str(error) or type(error).__name__)
                elif self._is_running():  # otherwise the rank that failed has recorded its reason
                    self._write_status("failed", lost_contact(error))

    def after_step(self, position: Position, guard: StepGuard) -> None:
        """Save if it is due; raises Interrupted, on all ranks after the same step, if any rank received a signal.

        Likewise the UserError of an earlier save that could not be written.
        """
        self.position = position
        stop = guard.stop_agreed()
        if stop or (self.checkpoint_steps is not None and position.step % self.checkpoint_steps == 0):
            guard.raise_if_non_finite(position.epoch)
            self._save(stop)

    def wait_for_batch(self, get: Callable[[], Item], guard: StepGuard | None = None) -> Item:
        """Returns `get()`, a loader's next batch; raises WaitEnded if it takes too long. A signal shortens the wait.

        After a signal a single process saves the last step and raises Interrupted. Several processes cannot save,
        because the others already wait in a collective: if the batch does not come soon, this raises UserError.
        """
        single = distributed.world_size() == 1
        try:
            return self.stop.wait_for(get, self.batch_seconds, ALONE_SECONDS if single else TOGETHER_SECONDS)
        except WaitEnded:
            if self.stop.asked is None:
                raise
        if not single:
            raise UserError(
                f"rank {distributed.rank()}: received {self.stop.asked}, and no batch came within {TOGETHER_SECONDS} "
                "seconds, so the run ends without a new checkpoint. An earlier checkpoint is intact."
            )
        if guard is not None:
            guard.raise_if_non_finite(self.position.epoch)
        self._save(stop=True)
        raise AssertionError  # not reached

    def stop_if_asked(self) -> None:
        """Save and raise Interrupted if any rank received a signal; see `after_step`. A collective."""
        if any(distributed.all_gather_object(self.stop.is_pending)):
            self._save(stop=True)

    def finish_epoch(
        self,
        results: dict[str, Metrics],
        line: dict[str, Any],
        show: Callable[[dict[str, Any], Callable[[], None]], None] | None = None,
    ) -> None:
        """Print the epoch's metrics; write model_<epoch>.pth, the best model, the log line and the checkpoint.

        results: the metrics of `val`, and with --model-ema also `val_ema`, those of the average, which then decide the
        best epoch; empty after an epoch without validation. After a kill in between, the resumed run writes the same
        files again. show: called last, on rank 0 with the log line and a function that waits for these files; the epoch
        is complete even if it then kills the process. Raises UserError, before anything is written, for a non-finite
        val loss or weight.
        """
        epoch = self.position.epoch
        if any(metrics["loss"] is None for metrics in results.values()):
            raise UserError(
                f"the loss on val after epoch {epoch} is not finite, so this epoch was not saved. An earlier "
                f"checkpoint is intact. {ADVICE}",
                agreed=True,
            )
        is_best = False
        if results:
            decisive = "val_ema" if "val_ema" in results else "val"
            f1 = results[decisive]["f1"]
            is_best, self.best_f1 = self.keep_best and f1 > self.best_f1, max(f1, self.best_f1)
            for name, metrics in results.items():
                best = "  (best)" if is_best and name == decisive else ""
                progress.say(f"epoch {epoch}, {name}: {format_metrics(metrics)}{best}")
        else:
            self.stop_if_asked()  # on a GPU a signal in the last steps is still unread, and the next epoch may be short
            progress.say(f"epoch {epoch}: not validated")
        self.position = Position(epoch + 1)
        self.meters.reset()
        state = self._state()
        for name, metrics in results.items():
            line = line | {f"{name}_{key}": value for key, value in metrics.items()}

        def write_epoch(state: dict[str, Any]) -> None:
            weights = checkpoint.weights_of(state)
            checkpoint.save(self.output_dir / f"model_{epoch}.pth", weights)
            if is_best:
                checkpoint.save(self.output_dir / checkpoint.BEST, weights)
            append_log(self.output_dir, line)

        with agreed():
            if distributed.is_main_process():
                self._start_writing(state, before=write_epoch)
                if show is not None:
                    show(line, self.writing.wait)

    def _state(self) -> dict[str, Any]:
        return {
            "format_version": checkpoint.FORMAT_VERSION,
            **self.origin,
            **self.position._asdict(),
            "best_f1": self.best_f1,
            **self.training.take(),
        }

    def _save(self, stop: bool) -> None:
        """Write the checkpoint; raise Interrupted if the run should stop."""
        state = self._state()
        names = [name for name in distributed.all_gather_object(self.stop.asked) if name] if stop else []
        message = f"{names[0]}: stopped" if names else ""
        with agreed():
            if distributed.is_main_process():
                self._start_writing(state, "interrupted" if stop else "running", message)
                if stop:
                    self.writing.wait()
        if stop:
            raise Interrupted(
                f"{names[0]}: stopped after {self.position.step} steps of epoch {self.position.epoch}; "
                f"{self.output_dir / checkpoint.CHECKPOINT} is saved; the same command with --resume auto continues "
                "from there."
            )

    def _start_writing(
        self,
        state: dict[str, Any],
        status: str = "running",
        message: str = "",
        before: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Write the checkpoint and the status in a thread, from a copy of the state; waits for an earlier write.

        before: writes other files first, from the same copy. Raises UserError for non-finite weights, and if the
        earlier write failed.
        """
        self.writing.wait()
        self._check_finite()
        staged = checkpoint.stage(state)

        def write() -> None:
            if before is not None:
                before(staged)
            checkpoint.save_checkpoint(self.output_dir, staged)
            self.saved = Position.of(staged)
            recorded = self._read_status()
            if recorded.get("status") == "failed":  # another rank has failed meanwhile, and recorded its reason
                self._write_status("failed", str(recorded.get("message", "")))
            else:
                self._write_status(status, message)

        self.writing.start(write)

    def _check_finite(self) -> None:
        """Raise UserError for non-finite weights: a gradient can overflow although every loss is finite."""
        name = self.training.first_not_finite()
        if name is not None:
            raise UserError(
                f"{name} is not finite after {self.position.step} steps of epoch {self.position.epoch}, so nothing was "
                f"saved. An earlier checkpoint is intact. {ADVICE}"
            )

    def _ask_to_stop(self) -> None:
        self.stop.failed = True

    def _is_running(self) -> bool:
        """Whether status.json says "running" for this start; another start may own the folder by now."""
        if run_lock.look_at(self.output_dir).holder not in (None, self.lock_holder):
            return False
        return self._read_status().get("status") == "running"

    def _read_status(self) -> dict[str, Any]:
        """The content of status.json; empty if it cannot be read."""
        with suppress(OSError, ValueError):
            content = read_json(self.output_dir / STATUS)
            if isinstance(content, dict):
                return content
        return {}

    def _write_status(self, status: str, message: str) -> None:
        saved = self.saved._asdict()
        if not distributed.is_main_process():
            saved |= self._read_status()  # rank 0 knows the position, and has recorded it
        content = {"status": status, "epoch": saved["epoch"], "step": saved["step"], "message": message}
        content["time"] = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(self.output_dir / STATUS, content)


def _should_report(error: BaseException) -> bool:
    """Whether this rank should report the error."""
    if isinstance(error, UserError):
        return distributed.is_main_process() or not error.agreed
    return not distributed.failure_posted()
