"""The scripts' real loops, built by their own `prepare`, over one batch on the device or over image files."""

import io
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from _policy_gradient import train as policy_gradient
from _policy_gradient.masking import Masking, build_policy
from utils.data.dataset import Batch, batches
from utils.data.samplers import TrainingSampler
from utils.runtime.progress import Position
from utils.training import run_lock
from utils.training.evaluation import Predictions
from utils.training.run import Run, Training, begin, build_classifier, build_evaluation, build_saver
from utils.training.update import GuardedUpdate


class Loop(NamedTuple):
    """A script's training loop and evaluation with all their inputs."""

    run: Run
    training: Training
    masking: Masking | None
    train: Callable[..., dict[str, float]]
    predict: Callable[..., Predictions]
    classifier: nn.Module

    def train_epoch(
        self, loader: "DataLoader | FixedLoader", epoch: int = 0, update: GuardedUpdate | None = None
    ) -> dict[str, float]:
        """One pass of the real loop over a loader; nothing is saved, and the host waits only at the last step.

        update: replaces the script's own.
        """
        saver = build_saver(self.run, self.training).idle()
        saver.position = Position(epoch)
        settings = self.training.settings._replace(print_freq=len(loader.batch_sampler) + 1)
        with silence():
            return self.train(update or self.training.update, self.training.data.with_loader(loader), saver, settings)

    def evaluate(self, loader: "DataLoader | Watched") -> None:
        """The real evaluation of the real split."""
        with silence():
            self.predict(self.classifier, loader=loader)

    @property
    def loader(self) -> DataLoader:
        return self.training.data.loader

    @property
    def device(self) -> torch.device:
        return self.run.device


def build(script: ModuleType, data: Path, output: Path, *flags: object) -> Loop:
    """Build what the script's `main` trains with these flags: networks, optimisers, loaders, cache, compilation."""
    torch.compiler.reset()  # networks of earlier loops count against torch's limit of recompilations
    command = [str(part) for part in ("--data-path", data, "--output-dir", output, *flags)]
    with silence():
        run = begin(script.build_parser(), command, script.SCRIPT)
        classifier = build_classifier(run)
        predict = build_evaluation(run)
        if script is policy_gradient:
            policy = build_policy(run.args, run.state, run.weights, run.device)
            training, masking = script.prepare(run, classifier, policy)
            train = partial(script.train_one_epoch, training.network, masking)
        else:
            training, masking = script.prepare(run, classifier), None
            train = partial(script.train_one_epoch, training.network)
    run_lock.release()  # nothing is saved in the folder
    return Loop(run, training, masking, train, predict, classifier)


class Watched:
    """A loader that measures the seconds from its `skip`-th batch to the end of the pass.

    The workers' first batches take longer, which does not matter in an epoch of some thousand steps.
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
        """Seconds of a pass over this loader, without its first `skip` batches."""
        work()
        self.synchronize()
        return time.perf_counter() - self.start


class FixedLoader:
    """Yields one batch of the script's own loader, already on the device, `steps` times."""

    num_workers = 0

    def __init__(self, loop: Loop, steps: int) -> None:
        self.batch, self.steps = first_batch(loop.loader, loop.device), steps
        self.dataset = SimpleNamespace(path=loop.loader.dataset.path, on_device=None)
        batch_size = len(self.batch.images)
        self.batch_sampler = TrainingSampler(steps * batch_size, batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return itertools.repeat(self.batch, self.steps)

    @property
    def images(self) -> int:
        """The number of images in one pass."""
        return self.batch_sampler.num_images


def first_batch(loader: DataLoader, device: torch.device) -> Batch:
    """The first batch of a script's loader, on the device; read in this process."""
    keys = next(iter(loader.batch_sampler))
    return next(batches(DataLoader(loader.dataset, batch_sampler=[keys], collate_fn=loader.collate_fn), device))


def network_input(loop: Loop, loader: FixedLoader) -> tuple[Tensor, Tensor]:
    """The loader's batch as input of the networks: normalised images (B, 3, S, S), and targets (B,)."""
    return loop.run.normalize(loader.batch.images), loader.batch.targets


@contextmanager
def silence() -> Iterator[None]:
    """Suppress lines, bars, and the warning about a schedule that is stepped before its optimiser."""
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text), warnings.catch_warnings(action="ignore"):
        yield
