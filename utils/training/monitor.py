"""--plot-every and --tracker: plots of a run and what its trackers receive. A failure here never ends a training."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checkpoints.checkpoint import HEATED
from utils.results.log import read_log
from utils.runtime import progress
from utils.runtime.errors import first_line
from utils.runtime.files import remove_temporaries, write_atomically
from utils.training.evaluation import Predictions
from utils.training.trackers import PLOTS, TRACKERS, Tracker

if TYPE_CHECKING:  # imported where it is used: it costs a process's start seconds
    from matplotlib.figure import Figure


class Monitor:
    """Plots in OUTPUT/plots, and the trackers. Only rank 0 calls the methods."""

    def __init__(
        self,
        output_dir: Path,
        classes: list[str],
        *,
        first_epoch: int,
        epochs: int,
        plot_every: int | None,
        trackers: Iterable[str] = (),
        draw_gallery: Callable[..., "Figure"] | None = None,
    ) -> None:
        """first_epoch: the next one; plot_every: None for no plots; trackers: names of TRACKERS.

        draw_gallery: draws masks, given `epochs_done`.
        """
        self.output_dir, self.classes, self.first_epoch, self.epochs = output_dir, classes, first_epoch, epochs
        self.plot_every, self.draw_gallery = plot_every, draw_gallery
        self.trackers = [TRACKERS[name](output_dir, first_epoch) for name in trackers]

    def begin(self, fresh: bool) -> None:
        """Before the first epoch: remove leftovers of a kill and galleries of epochs to be repeated.

        Also opens the trackers, sends the epochs that a kill or an earlier start has left out, and draws the masks of
        an untrained policy.
        """
        with warning_of(PLOTS):
            remove_temporaries(self.output_dir / PLOTS)
            for path in (self.output_dir / PLOTS).glob("masks_*.png"):
                number = path.stem.removeprefix("masks_")
                if number.isdecimal() and int(number) >= self.first_epoch:
                    path.unlink()
        self._track(lambda tracker: tracker.open())
        if self.first_epoch == self.epochs:
            self._track(lambda tracker: tracker.catch_up())
        if self.plot_every is not None and fresh and self.draw_gallery is not None:
            self._draw("masks_before.png", self.draw_gallery, epochs_done=0)
            gc.collect()  # see `show`

    def show(self, predictions: Predictions | None, line: dict[str, Any], wait: Callable[[], None]) -> None:
        """Draw the epoch's plots and send it to the trackers, once its checkpoint is saved.

        predictions: those of val after this epoch; None without a validation, and then the plots made from predictions
        stay those of an earlier epoch. wait: returns once the checkpoint is saved; called only if there is something to
        draw or send. After a kill, the resumed run sends the missing epoch; missing plots come with the next plotted
        epoch.
        """
        done = line["epoch"] + 1
        draws = self.plot_every is not None and (done % self.plot_every == 0 or done == self.epochs)
        if draws or self.trackers:
            wait()
        if draws:
            self._draw_all(predictions, done)
            # matplotlib's parser leaves exceptions in reference cycles that hold the frame of `main`. The loaders would
            # outlive it, and the interpreter would wait 20 s for their workers at exit.
            gc.collect()
        self._track(lambda tracker: tracker.catch_up())

    def close(self, failed: bool) -> None:
        """Close the trackers. failed: this start ends before the training is complete."""
        self._track(lambda tracker: tracker.close(failed))

    def _track(self, action: Callable[[Tracker], None]) -> None:
        """Call `action` with each tracker; one that raises is dropped with a warning, unless it keeps trying."""
        for tracker in list(self.trackers):
            if tracker.keeps_trying:
                with warning_of(tracker.name):
                    action(tracker)
                continue
            try:
                action(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                tracker.abandon()
                progress.say(f"warning: {tracker.name} failed ({first_line(error)}); the training is not affected.")

    def _draw_all(self, predictions: Predictions | None, epochs_done: int) -> None:
        with warning_of(PLOTS):
            from utils.results import confusion, curves

            runs = {self.output_dir.resolve().name: read_log(self.output_dir)}
            self._draw("curves.png", curves.learning_curves, runs)
            if predictions is not None:
                title = f"val, after epoch {epochs_done - 1}"
                targets, predicted = predictions.targets.numpy(), predictions.logits.argmax(1).numpy()
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
