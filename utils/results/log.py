"""log.jsonl: one line of JSON per epoch."""

import json
from pathlib import Path
from types import NoneType

from utils.checkpoints.verify import MOST_EPOCHS
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.reading import parse_json, read_bytes

LOG = "log.jsonl"


def read_log(folder: Path) -> list[dict]:
    """The lines of a folder's log.jsonl; none without the file. A last line that was cut short is left out."""
    path = folder / LOG
    try:
        lines = [parse_json(line) for line in read_bytes(path).split(b"\n")[:-1]]
        epochs = [line["epoch"] for line in lines]
        numbers = all(isinstance(value, (int, float, NoneType)) for line in lines for value in line.values())
        counts = all(type(epoch) is int and 0 <= epoch <= MOST_EPOCHS for epoch in epochs)
        if not numbers or not counts or epochs != sorted(set(epochs)):
            raise ValueError
        return lines
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected the log of a run.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: holds a line that is not the JSON of an epoch; fix or remove the file.") from None


def write_log(folder: Path, lines: list[dict]) -> None:
    """Replace log.jsonl on rank 0, atomically."""
    if distributed.is_main_process():
        write_atomically(folder / LOG, "".join(json.dumps(line) + "\n" for line in lines).encode())


def append_log(folder: Path, line: dict) -> None:
    """Add the line of an epoch to log.jsonl."""
    write_log(folder, [*read_log(folder), line])
