"""What --plot-every and --tensorboard show of a run, on rank 0; what fails is named, and the training goes on."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from utils.results.log import read_log
from utils.runtime import distributed, progress
from utils.runtime.errors import UserError
from utils.runtime.files import remove_temporaries, write_atomically
from utils.training.evaluation import Predictions

if TYPE_CHECKING:  # both are imported where they are used: they cost a process's start seconds
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Pictures of the run in OUTPUT/plots, and its events in OUTPUT/tensorboard. Rank 0 alone calls the methods."""

    def __init__(
        self,
        output_dir: Path,
        classes: list[str],
        *,
        first_epoch: int,
        epochs: int,
        plot_every: int | None,
        tensorboard: bool,
        draw_gallery: Callable[..., "Figure"] | None = None,
    ) -> None:
        """first_epoch: the one to come; plot_every: None: no pictures; draw_gallery: by `epochs_done`, of a policy."""
        self.output_dir, self.classes, self.first_epoch, self.epochs = output_dir, classes, first_epoch, epochs
        self.plot_every, self.draw_gallery = plot_every, draw_gallery
        self.events = Events(output_dir, first_epoch) if tensorboard else None

    def begin(self, fresh: bool) -> None:
        """Before the first epoch: remove what a kill has left, or a later epoch that is to be done anew; of a fresh run
        show what the policy does untrained; tell the events of a last epoch that a kill cut off.
        """
        with warning_of(PLOTS):
            remove_temporaries(self.output_dir / PLOTS)
            for path in (self.output_dir / PLOTS).glob("masks_*.png"):
                number = path.stem.removeprefix("masks_")
                if number.isdecimal() and int(number) >= self.first_epoch:
                    path.unlink()
        if self.events is not None and self.first_epoch == self.epochs:
            with warning_of("tensorboard"):
                self.events.write(self.epochs - 1)
                self.events.close()
        if self.plot_every is None:
            return
        if fresh and self.draw_gallery is not None:
            self._draw("masks_before.png", self.draw_gallery, epochs_done=0)
            gc.collect()  # see `show`

    def show(self, predictions: Predictions, line: dict[str, Any]) -> None:
        """Once an epoch's checkpoint is saved. What a kill cuts off here the events catch up with when the run resumes;
        pictures come with the next epoch that has some, or by the commands. predictions: of val after this epoch.
        """
        if self.plot_every is None and self.events is None:
            return
        done = line["epoch"] + 1
        if self.events is not None:  # first, since drawing takes most and may fail
            with warning_of("tensorboard"):
                self.events.write(line["epoch"])
        if self.plot_every is not None and (done % self.plot_every == 0 or done == self.epochs):
            self._draw_all(predictions, done)
        if self.events is not None:
            with warning_of("tensorboard"):
                self.events.write_masks(line["epoch"])
                if done == self.epochs:
                    self.events.close()
        # matplotlib's parser leaves exceptions in cycles, whose frames hold main's: the loaders would outlive it, and
        # their workers be ended by the interpreter's exit, which waits for them for 20 s.
        gc.collect()

    def _draw_all(self, predictions: Predictions, epochs_done: int) -> None:
        with warning_of(PLOTS):
            from utils.results import confusion, curves

            runs = {self.output_dir.resolve().name: read_log(self.output_dir)}
            what = f"val, after epoch {epochs_done - 1}"
            found = predictions.targets.numpy(), predictions.logits.argmax(1).numpy(), self.classes, what
            self._draw("curves.png", curves.learning_curves, runs)
            self._draw("confusion.png", confusion.confusion_matrix, *found)
            self._draw("recall.png", confusion.per_class_recall, *found)
            if self.draw_gallery is not None:
                self._draw("health.png", curves.policy_health, runs)
                self._draw(f"masks_{epochs_done - 1}.png", self.draw_gallery, epochs_done=epochs_done)

    def _draw(self, name: str, draw: Callable[..., "Figure"], *args: Any, **kwargs: Any) -> None:
        with warning_of(f"{PLOTS}/{name}"):
            from utils.results.figures import as_png

            content = as_png(draw(*args, **kwargs))
            (self.output_dir / PLOTS).mkdir(exist_ok=True)
            write_atomically(self.output_dir / PLOTS / name, content)


@contextmanager
def warning_of(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a line that names it: a picture is not worth a training."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        progress.say(f"warning: {name} could not be written ({reason}); the training goes on.")


FOLDER = "tensorboard"
PLOTS = "plots"  # where the mask galleries lie
POLICY = ("mask_", "policy_", "advantage_", "prior_", "concentrations_")  # how the log's names of policies begin


def check_installed() -> None:
    """Raise UserError, before a run begins, where the package of --tensorboard cannot be imported; rank 0 writes."""
    if not distributed.is_main_process():
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except Exception as error:  # a package that is broken raises anything
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"--tensorboard: the package tensorboard cannot be imported ({reason}). Install it with pip install "
            "tensorboard, or leave it out with --no-tensorboard."
        ) from None


class Events:
    """OUTPUT/tensorboard: each number of log.jsonl as a scalar, its step the epoch.

    The log is what counts: a resumed run replaces the events of its last epoch, which a kill may have cut off, and of
    all later ones. Where there are no events yet, all epochs of the log are written.
    """

    def __init__(self, output_dir: Path, first_epoch: int) -> None:
        """first_epoch: the one to come."""
        self.output_dir, self.folder = output_dir, output_dir / FOLDER
        there = any(self.folder.glob("*tfevents*"))
        self.next_epoch = max(first_epoch - 1, 0) if there else 0  # the first that is not written, or not for sure
        self.writer: SummaryWriter | None = None

    def write(self, epoch: int) -> None:
        """Write the lines of the log up to this epoch's that are not yet there, with the mask galleries that are.

        Raises what the file system or TensorBoard raise; what was not written is written by the next call.
        """
        try:
            if self.writer is None:  # only now, since its thread should not be there when loaders fork their workers
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.folder), purge_step=self.next_epoch)
            for line in read_log(self.output_dir)[self.next_epoch :]:
                for name, value in line.items():
                    if name != "epoch" and value is not None:
                        self.writer.add_scalar(tag(name), value, line["epoch"])
                self._add_masks(line["epoch"])
            self.writer.flush()
        except Exception:
            self.writer = None  # it goes on failing; a new one writes a new file
            raise
        self.next_epoch = epoch + 1

    def write_masks(self, epoch: int) -> None:
        """Write the gallery of an epoch whose line is written; nothing where there is none."""
        if self.writer is not None:
            self._add_masks(epoch)
            self.writer.flush()

    def _add_masks(self, epoch: int) -> None:
        masks = self.output_dir / PLOTS / f"masks_{epoch}.png"
        if masks.exists():
            pixels = np.asarray(Image.open(masks).convert("RGB"))
            self.writer.add_image("masks", pixels, epoch, dataformats="HWC")

    def close(self) -> None:
        """At the end of the run."""
        if self.writer is not None:
            self.writer.close()


def tag(name: str) -> str:
    """Where TensorBoard shows a quantity of the log: such as train/loss, val/f1, policy/mask_std, run/skipped_steps."""
    group, _, rest = name.partition("_")
    if group in ("train", "val", "lr", "policy"):
        return f"{group}/{rest}"
    return f"policy/{name}" if name.startswith(POLICY) else f"run/{name}"
