"""--tracker: the log, the mask gallery and run.json in TensorBoard, Weights & Biases or Trackio.

A tracker follows log.jsonl on rank 0: after each epoch it sends the lines that have not been sent, so that a resumed
run continues where the previous start stopped. Nothing else is sent.
"""

import importlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from utils.results.log import read_log
from utils.results.provenance import RUN
from utils.results.validation import has_starts, read_checked
from utils.runtime import distributed, progress
from utils.runtime.errors import UserError, first_line
from utils.runtime.files import write_json
from utils.runtime.text import printable

if TYPE_CHECKING:  # all are imported where they are used: they are optional, and cost a process's start seconds
    import trackio
    import wandb
    from torch.utils.tensorboard import SummaryWriter

PLOTS, EVENTS = "plots", "tensorboard"  # folders in the --output-dir
STATE = "trackers.json"  # of Weights & Biases and Trackio: the run's id, and the next epoch to send
PROJECT = "policy-gradient-noise-masks"  # unless the environment names another
POLICY = ("mask_", "policy_", "advantage_", "prior_", "concentrations_")  # prefixes of policy quantities in the log
# How long the training waits for Weights & Biases and Trackio; the settings of wandb end its own waits sooner. Closing
# takes less than the 30 seconds after which torchrun kills a process.
OPEN_SECONDS, SEND_SECONDS, CLOSE_SECONDS, ABANDON_SECONDS = 60, 20, 25, 2
# Nothing is sent that this module does not send. `silent` also keeps wandb from asking for a login in a terminal.
WANDB_SETTINGS = {
    "console": "off", "save_code": False, "disable_code": True, "disable_git": True, "disable_job_creation": True,
    "label_disable": True, "x_disable_stats": True, "x_disable_machine_info": True, "x_disable_meta": True,
    "x_save_requirements": False, "host": "", "silent": True, "init_timeout": 30, "finish_timeout": 15,
    "finish_timeout_raises": True,
}  # fmt: skip
WANDB_VERSION = "0.28"  # the first with all of these settings


def tag(name: str) -> str:
    """The name of a quantity in every tracker, such as train/loss, val/f1, policy/mask_std or run/skipped_steps."""
    group, _, rest = name.partition("_")
    if group in ("train", "val", "lr", "policy"):
        return f"{group}/{rest}"
    return f"policy/{name}" if name.startswith(POLICY) else f"run/{name}"


class Tracker:
    """Sends each line of the log once, with its mask gallery. Only rank 0 calls the methods."""

    name: str
    package: str
    install: str  # the command that installs the package
    leave_out = "--tracker none"
    keeps_trying = False  # whether to go on after an error

    def __init__(self, output_dir: Path, first_epoch: int) -> None:
        """first_epoch: the next one of the training."""
        self.output_dir = output_dir
        self.next_epoch = self.first_to_send(first_epoch)

    @staticmethod
    def check() -> None:
        """Raise an exception if the imported package cannot be used."""

    def first_to_send(self, first_epoch: int) -> int:
        """The first epoch of the log that has not been sent."""
        raise NotImplementedError

    def open(self) -> None:
        """Connect before the first epoch, and send run.json."""

    def catch_up(self) -> None:
        """Send the lines of the log that have not been sent."""
        for line in read_log(self.output_dir):
            epoch = line["epoch"]
            if epoch < self.next_epoch:
                continue
            values = {tag(name): value for name, value in line.items() if name != "epoch" and value is not None}
            masks = self.output_dir / PLOTS / f"masks_{epoch}.png"
            self.send(epoch, values, masks if masks.exists() else None)
            self.next_epoch = epoch + 1

    def send(self, epoch: int, values: dict[str, float], masks: Path | None) -> None:
        """Send an epoch's numbers and, if it was drawn, its mask gallery."""
        raise NotImplementedError

    def close(self, failed: bool) -> None:
        """Close at the end of this start. failed: it ends before the training is complete."""

    def abandon(self) -> None:
        """Release what an error may have left behind; called before the tracker is dropped."""

    def run_json(self) -> dict[str, Any]:
        """The content of run.json, with escapes for bytes of class names that are not text."""
        content = read_checked(self.output_dir / RUN, has_starts) or {}
        text = json.dumps(content, ensure_ascii=False)
        return json.loads(re.sub("[\ud800-\udfff]", lambda match: rf"\\u{ord(match[0]):x}", text))


class TensorBoard(Tracker):
    """OUTPUT/tensorboard: scalars, with the epoch as their step.

    A resumed run replaces the events of its last epoch, which a kill may have cut off, and of all later ones. If there
    are no events yet, all epochs of the log are written.
    """

    name, package, install = "tensorboard", "torch.utils.tensorboard", "pip install tensorboard"
    leave_out = "--no-tensorboard"
    keeps_trying = True  # the disk may have room again

    def first_to_send(self, first_epoch: int) -> int:
        self.folder = self.output_dir / EVENTS
        self.writer: SummaryWriter | None = None
        return max(first_epoch - 1, 0) if any(self.folder.glob("*tfevents*")) else 0

    def catch_up(self) -> None:
        """Write what is missing. After an error of the file system or TensorBoard, the next call writes it again."""
        next_epoch = self.next_epoch
        try:
            if self.writer is None:  # only now: its thread must not exist when loaders fork their workers
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.folder), purge_step=self.next_epoch)
                self.writer.add_text(RUN, f"```\n{json.dumps(self.run_json(), indent=2)}\n```", self.next_epoch)
            super().catch_up()
            self.writer.flush()
        except Exception:
            self.writer = None  # a failed writer keeps failing; a new one writes a new file
            self.next_epoch = next_epoch
            raise

    def send(self, epoch: int, values: dict[str, float], masks: Path | None) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        if masks:
            self.writer.add_image("masks", np.asarray(Image.open(masks).convert("RGB")), epoch, dataformats="HWC")

    def close(self, failed: bool) -> None:
        if self.writer is not None:
            self.writer.close()


class Service(Tracker):
    """A tracker with a project and an own store; OUTPUT/trackers.json holds the run's id and the next epoch to send.

    The packages may use the network, so each call has a time limit.
    """

    def first_to_send(self, first_epoch: int) -> int:
        self.run: wandb.Run | trackio.Run | None = None
        state = (read_checked(self.output_dir / STATE, has_state) or {}).get(self.name)
        if state is None or (first_epoch == 0 and state["next_epoch"] > 0):  # of another run, which was in this folder
            self.id = self.new_id()
            return 0
        self.id = state["id"]
        return state["next_epoch"]

    def new_id(self) -> str:
        return secrets.token_hex(4)  # does not use the random numbers of the training

    def run_name(self) -> str:
        return printable(self.output_dir.resolve().name) or "run"

    def open(self) -> None:
        self.run = within(OPEN_SECONDS, self.start)
        self.save_state()

    def start(self) -> "wandb.Run | trackio.Run":
        """The run in this tracker: a new one, or that of the stored id."""
        raise NotImplementedError

    def send(self, epoch: int, values: dict[str, float], masks: Path | None) -> None:
        within(SEND_SECONDS, lambda: self.log(epoch, values, masks))
        self.save_state(epoch + 1)

    def log(self, epoch: int, values: dict[str, float], masks: Path | None) -> None:
        raise NotImplementedError

    def save_state(self, next_epoch: int | None = None) -> None:
        content = read_checked(self.output_dir / STATE, has_state) or {}
        state = {"id": self.id, "next_epoch": self.next_epoch if next_epoch is None else next_epoch}
        write_json(self.output_dir / STATE, {**content, self.name: state})


class WeightsAndBiases(Service):
    """Weights & Biases. Its variables are respected, such as WANDB_PROJECT, WANDB_MODE and WANDB_DIR."""

    name, package, install = "wandb", "wandb", f'pip install "wandb>={WANDB_VERSION}"'

    @staticmethod
    def check() -> None:
        import wandb

        wandb.Settings(**WANDB_SETTINGS)

    def new_id(self) -> str:
        return os.environ.get("WANDB_RUN_ID") or super().new_id()  # of a sweep

    def start(self) -> "wandb.Run":
        import wandb

        settings = wandb.Settings(**WANDB_SETTINGS)
        wandb.setup(settings=settings)
        content = self.run_json()
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or self.run_name(),
            id=self.id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or self.output_dir,
            config=content,
            allow_val_change=True,  # each start adds to run.json
            settings=settings,
        )
        progress.say(f"wandb: {run.url or f'offline, in {run.settings.sync_dir}'}")
        return run

    def log(self, epoch: int, values: dict[str, float], masks: Path | None) -> None:
        import wandb

        picture = {"masks": wandb.Image(str(masks))} if masks else {}
        self.run.log(values | picture, step=epoch, commit=True)

    def close(self, failed: bool) -> None:
        if self.run is None:
            return
        try:
            within(CLOSE_SECONDS, lambda: self.run.finish(exit_code=int(failed)))
        except TimeoutError:
            folder = self.run.settings.sync_dir
            raise TimeoutError(f"not everything was sent in time; wandb sync {folder} sends the rest") from None
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End wandb's service process, or wait for it no longer: at exit, wandb would wait without a limit."""
        import wandb

        with suppress(Exception):
            within(ABANDON_SECONDS, wandb.teardown)


class Trackio(Service):
    """Trackio: in the folder TRACKIO_DIR, or where its other variables say."""

    name, package = "trackio", "trackio"
    install = 'pip install trackio, followed by pip install "pillow>=13", because trackio installs an older pillow'

    def new_id(self) -> str:
        return f"{self.run_name()}-{super().new_id()}"  # kept when the folder is renamed

    def start(self) -> "trackio.Run":
        import trackio

        return trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=self.id,  # by which trackio finds the run again
            resume="allow",
            config=self.run_json(),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, epoch: int, values: dict[str, float], masks: Path | None) -> None:
        import trackio

        picture = {"masks": trackio.Image(str(masks))} if masks else {}
        self.run.log(values | picture, step=epoch)

    def close(self, failed: bool) -> None:
        if self.run is not None:
            within(CLOSE_SECONDS, self.run.finish)


TRACKERS = {tracker.name: tracker for tracker in (TensorBoard, WeightsAndBiases, Trackio)}


def check_installed(names: Iterable[str]) -> None:
    """Raise UserError on rank 0, before a run starts, if the package of a tracker cannot be imported or used."""
    if not distributed.is_main_process():
        return
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports to wandb's developers
    # Seconds until a sent epoch is in wandb's file (otherwise 15), where a kill cannot undo it. As a variable, since
    # versions without this setting refuse it as an argument.
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    for name in names:
        tracker = TRACKERS[name]
        flag = "--tensorboard" if tracker is TensorBoard else f"--tracker {name}"
        try:
            importlib.import_module(tracker.package)
            tracker.check()
        except Exception as error:  # a broken package can raise anything
            raise UserError(
                f"{flag}: the package {name} cannot be imported ({first_line(error)}). Install it with "
                f"{tracker.install}; or leave it out with {tracker.leave_out}."
            ) from None


def has_state(content: dict[str, Any]) -> bool:
    """Whether trackers.json holds an id and an epoch for each of its trackers."""
    return all(
        isinstance(state["id"], str) and type(state["next_epoch"]) is int and state["next_epoch"] >= 0
        for state in content.values()
    )


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of `call`, run in a thread; raises its exception, or TimeoutError if it takes longer."""
    outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds} seconds") from None
    if error is None:
        return result
    try:
        raise error
    finally:
        del error  # with its traceback it would form a cycle that holds the frames of the caller
