"""What a run has told TensorBoard, and what it should have."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from utils.training.trackers import tag


def number_files_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in the order of their names, which is that of time, but for the tenth of a process in a second."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The steps and values of each tag, as TensorBoard shows them."""
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def images(folder: Path) -> list[int]:
    """The steps of the mask gallery."""
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [event.step for event in found.Images("masks")] if "masks" in found.Tags()["images"] else []


def as_scalars(log: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """What `scalars` should give of the lines of a log, approximately."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        for name, value in line.items():
            if name != "epoch" and value is not None:
                expected.setdefault(tag(name), []).append((line["epoch"], pytest.approx(value, rel=1e-6)))
    return expected
