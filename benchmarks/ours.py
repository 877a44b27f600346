"""The scripts' real loops, on data that is already on the device or on that of real files."""

import contextlib
import inspect
import io
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from utils.data.dataset import Batch, batches
from utils.data.samplers import TrainingSampler
from utils.runtime.progress import Position
from utils.training import build as wiring
from utils.training.update import GuardedUpdate


class Built(Exception):
    """Raised inside a script's `main` once it has built everything and would begin to train."""


class Loop(NamedTuple):
    """What a script's `main` hands to its own loop and to its evaluation, by the names of their parameters."""

    train_one_epoch: Callable[..., dict[str, float]]
    training: dict[str, Any]
    predict: Callable[..., Any]
    evaluation: dict[str, Any]

    def run(self, loader: "DataLoader | FixedLoader", epoch: int = 0) -> dict[str, float]:
        """One pass of the real loop over a loader; nothing is saved, and the host waits at the last step only."""
        saver = self.training["saver"].idle()
        saver.position = Position(epoch)
        steps = len(loader.batch_sampler) + 1
        with silence():
            return self.train_one_epoch(**{**self.training, "loader": loader, "saver": saver, "print_freq": steps})

    def evaluate(self, loader: "DataLoader | Watched") -> None:
        """The real evaluation of the real split."""
        with silence():
            self.predict(**{**self.evaluation, "loader": loader})

    @property
    def device(self) -> torch.device:
        return self.training["device"]

    @property
    def update(self) -> GuardedUpdate:
        return self.training["update"]

    @property
    def classifier(self) -> nn.Module:
        return self.training["classifier" if "classifier" in self.training else "model"]

    @property
    def autocast(self) -> Callable[[], torch.autocast]:
        """The context in which the script runs its networks."""
        dtype = self.training["autocast_dtype"]
        return partial(torch.autocast, self.device.type, dtype=dtype, enabled=dtype is not None)


def build(script: ModuleType, data: Path, output: Path, *flags: object) -> Loop:
    """Run the script's own `main` with these flags up to its first epoch, and take what it has built.

    So the networks' memory format, compilation, optimisers and loaders are those that users get, with no copy of `main`
    here to fall behind. Only the rehearsal before the first epoch is left out.
    """
    torch.compiler.reset()  # torch compiles a function so often only, and counts the networks of earlier loops
    torch._dynamo.reset()  # a model compiled before counts against the limit of recompilations
    train_one_epoch, predict, taken = script.train_one_epoch, script.predict, {}

    def take_training(*args: Any, **kwargs: Any) -> dict[str, float]:
        taken["training"] = inspect.signature(train_one_epoch).bind(*args, **kwargs).arguments
        return {}

    def take_evaluation(*args: Any, **kwargs: Any) -> None:
        taken["evaluation"] = inspect.signature(predict).bind(*args, **kwargs).arguments
        raise Built

    command = ["--data-path", data, "--output-dir", output, *flags]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(script, "train_one_epoch", take_training))
        stack.enter_context(patch.object(script, "predict", take_evaluation))
        stack.enter_context(patch.object(wiring, "rehearse", lambda *args, **kwargs: None))
        stack.enter_context(silence())
        stack.enter_context(contextlib.suppress(Built))
        script.main([str(part) for part in command])
    return Loop(train_one_epoch, taken["training"], predict, taken["evaluation"])


class Watched:
    """A loader as it is, and the seconds from its `skip`-th batch to the end of the pass.

    A pass begins with the workers' first batches, which an epoch of some thousand steps never notices.
    """

    def __init__(self, loader: DataLoader, skip: int, synchronize: Callable[[], None]) -> None:
        self.loader, self.skip, self.synchronize = loader, skip, synchronize

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(self.loader):
            if step == self.skip:
                self.synchronize()
                self.start = time.perf_counter()
            yield batch

    def seconds_of(self, work: Callable[[], object]) -> float:
        """Of a pass over this loader, that is, of all batches but the first `skip`."""
        work()
        self.synchronize()
        return time.perf_counter() - self.start


class FixedLoader:
    """One batch of the script's own loader, already on the device, given `steps` times."""

    num_workers = 0

    def __init__(self, loop: Loop, steps: int) -> None:
        loader = loop.training["loader"]
        self.batch = first_batch(loader, loop.device)
        self.batches = [self.batch] * steps
        self.dataset = SimpleNamespace(path=loader.dataset.path, on_device=None)  # nothing is left to be made there
        batch_size = len(self.batch.images)
        self.batch_sampler = TrainingSampler(steps * batch_size, batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @property
    def images(self) -> int:
        """In one pass."""
        return self.batch_sampler.num_images


@dataclass
class _OneBatch:
    """What `batches` asks of a loader."""

    dataset: Dataset
    batch: Batch
    num_workers: int = 0

    def __iter__(self) -> Iterator[Batch]:
        yield self.batch


def first_batch(loader: DataLoader, device: torch.device) -> Batch:
    """The first batch of a script's loader, on the device; read in this process."""
    keys = next(iter(loader.batch_sampler))
    return next(batches(_OneBatch(loader.dataset, loader.dataset.__getitems__(keys)), device))


def network_input(loop: Loop, loader: FixedLoader) -> tuple[Tensor, Tensor]:
    """The loader's batch as the script's networks see it: normalised images (B, 3, S, S), and targets (B,)."""
    return loop.training["normalize"](loader.batch.images), loader.batch.targets


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No lines, no bars, and no warning of a schedule that is stepped before its optimiser."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
