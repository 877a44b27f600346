"""--plot-every and --tensorboard: plots and events of a run, on rank 0. A failure here never ends a training."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from utils.checkpoints.checkpoint import HEATED
from utils.results.log import read_log
from utils.runtime import distributed, progress
from utils.runtime.errors import UserError, first_line
from utils.runtime.files import remove_temporaries, write_atomically
from utils.training.evaluation import Predictions

if TYPE_CHECKING:  # both are imported where they are used: they cost a process's start seconds
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

PLOTS, EVENTS = "plots", "tensorboard"  # the folders in the --output-dir
POLICY = ("mask_", "policy_", "advantage_", "prior_", "concentrations_")  # prefixes of policy quantities in the log


class Monitor:
    """Plots in OUTPUT/plots and events in OUTPUT/tensorboard. Only rank 0 calls the methods."""

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
        """first_epoch: the next one; plot_every: None for no plots; draw_gallery: draws masks, given `epochs_done`."""
        self.output_dir, self.classes, self.first_epoch, self.epochs = output_dir, classes, first_epoch, epochs
        self.plot_every, self.draw_gallery = plot_every, draw_gallery
        self.events = Events(output_dir, first_epoch) if tensorboard else None

    def begin(self, fresh: bool) -> None:
        """Before the first epoch: remove leftovers of a kill and galleries of epochs to be repeated.

        Also writes the events of a last epoch that a kill cut off, and draws the masks of an untrained policy.
        """
        with warning_of(PLOTS):
            remove_temporaries(self.output_dir / PLOTS)
            for path in (self.output_dir / PLOTS).glob("masks_*.png"):
                number = path.stem.removeprefix("masks_")
                if number.isdecimal() and int(number) >= self.first_epoch:
                    path.unlink()
        if self.events is not None and self.first_epoch == self.epochs:
            with warning_of(EVENTS):
                self.events.write(self.epochs - 1)
                self.events.close()
        if self.plot_every is None:
            return
        if fresh and self.draw_gallery is not None:
            self._draw("masks_before.png", self.draw_gallery, epochs_done=0)
            gc.collect()  # see `show`

    def show(self, predictions: Predictions, line: dict[str, Any]) -> None:
        """Write the epoch's events and plots, once its checkpoint is saved. predictions: those of val after this epoch.

        After a kill, the resumed run writes the missing events; missing plots come with the next plotted epoch.
        """
        if self.plot_every is None and self.events is None:
            return
        done = line["epoch"] + 1
        if self.events is not None:  # first, because drawing takes longest and may fail
            with warning_of(EVENTS):
                self.events.write(line["epoch"])
        if self.plot_every is not None and (done % self.plot_every == 0 or done == self.epochs):
            self._draw_all(predictions, done)
        if self.events is not None:
            with warning_of(EVENTS):
                self.events.write_masks(line["epoch"])
                if done == self.epochs:
                    self.events.close()
        # matplotlib's parser leaves exceptions in reference cycles that hold the frame of `main`. The loaders would
        # outlive it, and the interpreter would wait 20 s for their workers at exit.
        gc.collect()

    def _draw_all(self, predictions: Predictions, epochs_done: int) -> None:
        with warning_of(PLOTS):
            from utils.results import confusion, curves

            runs = {self.output_dir.resolve().name: read_log(self.output_dir)}
            title = f"val, after epoch {epochs_done - 1}"
            targets, predicted = predictions.targets.numpy(), predictions.logits.argmax(1).numpy()
            self._draw("curves.png", curves.learning_curves, runs)
            note = HEATED if self.draw_gallery is not None else ""
            arguments = (targets, predicted, self.classes, title, note)
            self._draw("confusion_val.png", confusion.confusion_matrix, *arguments)
            self._draw("recall_val.png", confusion.per_class_recall, *arguments)
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
    """Turn any error inside into a warning; a failed plot must not end a training."""
    try:
        yield
    except Exception as error:
        progress.say(f"warning: {name} could not be written ({first_line(error)}); the training continues.")


def check_installed() -> None:
    """Raise UserError on rank 0, before a run starts, if the package of --tensorboard cannot be imported."""
    if not distributed.is_main_process():
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except Exception as error:  # a broken package can raise anything
        raise UserError(
            f"--tensorboard: the package tensorboard cannot be imported ({first_line(error)}). Install it with pip "
            "install tensorboard, or leave it out with --no-tensorboard."
        ) from None


class Events:
    """OUTPUT/tensorboard: each number of log.jsonl as a scalar, with the epoch as its step.

    The log is authoritative: a resumed run replaces the events of its last epoch, which a kill may have cut off, and of
    all later ones. If there are no events yet, all epochs of the log are written.
    """

    def __init__(self, output_dir: Path, first_epoch: int) -> None:
        """first_epoch: the next one."""
        self.output_dir, self.folder = output_dir, output_dir / EVENTS
        has_events = any(self.folder.glob("*tfevents*"))
        self.next_epoch = max(first_epoch - 1, 0) if has_events else 0  # the first epoch to write
        self.writer: SummaryWriter | None = None

    def write(self, epoch: int) -> None:
        """Write the missing lines of the log up to this epoch, with their mask galleries.

        Raises any error of the file system or TensorBoard; the next call then writes what is missing.
        """
        try:
            if self.writer is None:  # only now: its thread must not exist when loaders fork their workers
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.folder), purge_step=self.next_epoch)
            for line in read_log(self.output_dir)[self.next_epoch :]:
                for name, value in line.items():
                    if name != "epoch" and value is not None:
                        self.writer.add_scalar(tag(name), value, line["epoch"])
                self._add_masks(line["epoch"])
            self.writer.flush()
        except Exception:
            self.writer = None  # a failed writer keeps failing; a new one writes a new file
            raise
        self.next_epoch = epoch + 1

    def write_masks(self, epoch: int) -> None:
        """Write the gallery, if there is one, of an epoch that has been written."""
        if self.writer is not None:
            self._add_masks(epoch)
            self.writer.flush()

    def _add_masks(self, epoch: int) -> None:
        masks = self.output_dir / PLOTS / f"masks_{epoch}.png"
        if masks.exists():
            pixels = np.asarray(Image.open(masks).convert("RGB"))
            self.writer.add_image("masks", pixels, epoch, dataformats="HWC")

    def close(self) -> None:
        """Close the file at the end of the run."""
        if self.writer is not None:
            self.writer.close()


def tag(name: str) -> str:
    """The TensorBoard tag of a quantity, such as train/loss, val/f1, policy/mask_std or run/skipped_steps."""
    group, _, rest = name.partition("_")
    if group in ("train", "val", "lr", "policy"):
        return f"{group}/{rest}"
    return f"policy/{name}" if name.startswith(POLICY) else f"run/{name}"
