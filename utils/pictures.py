"""What --plot-every and --tensorboard show of a run, on rank 0; what fails is named, and the training goes on."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import progress
from utils.evaluation import Predictions
from utils.events import Events
from utils.files import remove_temporaries, write_atomically

if TYPE_CHECKING:  # matplotlib is imported where it is used: it costs a process's start a second
    from matplotlib.figure import Figure

PLOTS = "plots"


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
        self.output_dir, self.classes, self.epochs = output_dir, classes, epochs
        self.plot_every, self.draw_gallery = plot_every, draw_gallery
        self.events = Events(output_dir, first_epoch) if tensorboard else None

    def begin(self, fresh: bool) -> None:
        """Before the first epoch: remove what a kill has left; of a fresh run show what the policy does untrained."""
        if self.plot_every is None:
            return
        with warning_of(PLOTS):
            remove_temporaries(self.output_dir / PLOTS)
        if fresh and self.draw_gallery is not None:
            self._draw("masks_before.png", self.draw_gallery, epochs_done=0)
            gc.collect()  # see `show`

    def show(self, predictions: Predictions, line: dict[str, Any]) -> None:
        """Once an epoch's line is in the log, and before its checkpoint: what a kill cuts off is shown on resuming.

        predictions: of val after this epoch.
        """
        if self.plot_every is None and self.events is None:
            return
        done = line["epoch"] + 1
        is_last = done == self.epochs
        masks = None
        if self.plot_every is not None and (done % self.plot_every == 0 or is_last):
            masks = self._draw_all(predictions, done)
        if self.events is not None:
            with warning_of("tensorboard"):
                self.events.write(line["epoch"], masks)
                if is_last:
                    self.events.close()
        # matplotlib's parser leaves exceptions in cycles, whose frames hold main's: the loaders would outlive it, and
        # their workers be ended by the interpreter's exit, which waits for them for 20 s.
        gc.collect()

    def _draw_all(self, predictions: Predictions, epochs_done: int) -> bytes | None:
        """Returns the gallery's bytes, if there is one."""
        with warning_of(PLOTS):
            from utils import plots

            runs = {self.output_dir.resolve().name: progress.read_log(self.output_dir)}
            found = predictions.targets.numpy(), predictions.logits.argmax(1).numpy(), self.classes
            self._draw("curves.png", plots.learning_curves, runs)
            self._draw("confusion.png", plots.confusion_matrix, *found)
            self._draw("recall.png", plots.per_class_recall, *found)
            if self.draw_gallery is not None:
                self._draw("health.png", plots.policy_health, runs)
                return self._draw(f"masks_{epochs_done - 1}.png", self.draw_gallery, epochs_done=epochs_done)
        return None

    def _draw(self, name: str, draw: Callable[..., "Figure"], *args: Any, **kwargs: Any) -> bytes | None:
        """Write a picture, and return it; None if that failed."""
        with warning_of(f"{PLOTS}/{name}"):
            from utils.figures import as_png

            content = as_png(draw(*args, **kwargs))
            (self.output_dir / PLOTS).mkdir(exist_ok=True)
            write_atomically(self.output_dir / PLOTS / name, content)
            return content
        return None


@contextmanager
def warning_of(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a line that names it: a picture is not worth a training."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        progress.say(f"warning: {name} could not be written ({reason}); the training goes on.")
