"""What Weights & Biases and Trackio have stored of a run."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from utils.training.trackers import tag

BLOCK, HEADER = 32768, 7  # bytes of the blocks of a .wandb file, and of the headers of the file and of each fragment
LAST_FRAGMENTS = (1, 4)  # a record in one fragment, and the last of several


def records(folder: Path) -> list[list[Any]]:
    """The records of each .wandb file in OUTPUT/wandb, in the order of the starts."""
    files = sorted((folder / "wandb").glob("*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [list(_records(path.read_bytes())) for path in files]


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    position, content = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        content += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in LAST_FRAGMENTS:
            record = Record()
            record.ParseFromString(content)
            content = b""
            yield record


def wandb_rows(starts: list[list[Any]]) -> list[dict[str, Any]]:
    """The rows of all starts; the keys of wandb itself begin with an underscore, _step being the step."""
    items = [record.history.item for start in starts for record in start if record.HasField("history")]
    rows: list[dict[str, Any]] = []
    for row in items:
        rows.append({})
        for item in row:
            name = ".".join(item.nested_key) or item.key
            rows[-1][name] = json.loads(item.value_json)
    return rows


def trackio_rows(trackio: ModuleType, project: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each run of a project."""
    storage = trackio.sqlite_storage.SQLiteStorage
    return {run.name: storage.get_logs(project, run.name, run_id=run.id) for run in trackio.Api().runs(project)}


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The quantities of a row, without the keys of the tracker and pictures."""
    return {name: value for name, value in row.items() if "/" in name and isinstance(value, (int, float))}


def as_rows(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `numbers` should give for the lines of a log, exactly."""
    rows = [{tag(name): value for name, value in line.items() if name != "epoch" and value is not None} for line in log]
    return [pytest.approx(row, rel=0, abs=0, nan_ok=True) for row in rows]
