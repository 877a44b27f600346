"""What --plot-every and --tensorboard show of a run, on rank 0; what fails is named, and the training goes on."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.results.curves import learning_curves, policy_health
from utils.results.log import read_log
from utils.runtime import progress
from utils.runtime.files import remove_temporaries, write_atomically
from utils.training.evaluation import Predictions
from utils.training.events import PLOTS, Events

if TYPE_CHECKING:  # matplotlib is imported where it is used: it costs a process's start a second
    from matplotlib.figure import Figure


class Pictures:
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
            from utils import plots

            runs = {self.output_dir.resolve().name: read_log(self.output_dir)}
            what = f"val, after epoch {epochs_done - 1}"
            found = predictions.targets.numpy(), predictions.logits.argmax(1).numpy(), self.classes, what
            self._draw("curves.png", learning_curves, runs)
            self._draw("confusion.png", plots.confusion_matrix, *found)
            self._draw("recall.png", plots.per_class_recall, *found)
            if self.draw_gallery is not None:
                self._draw("health.png", policy_health, runs)
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
