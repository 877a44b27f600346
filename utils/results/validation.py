"""Reads the JSON files of a run's folder, which users may have edited or damaged."""

import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

from utils.choices import SPLITS
from utils.runtime.reading import read_json


def read_checked(path: Path, is_valid: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The object in a JSON file; {} if there is no such file; None if it is unreadable or not valid.

    is_valid: may raise an exception for content of another shape.
    """
    try:
        content = read_json(path)
        return content if isinstance(content, dict) and is_valid(content) else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def has_starts(content: dict[str, Any]) -> bool:
    """Whether run.json lists the starts of a run."""
    return isinstance(content["starts"], list) and all(map(is_start, content["starts"]))


def is_start(start: Any) -> bool:
    """Whether this is what `provenance.describe` returns."""
    return (
        isinstance(start, dict)
        and all(isinstance(start.get(name), str) for name in ("command", "time", "device", "machine"))
        and type(start.get("processes")) is int
        and isinstance(start.get("commit", 0), (str, NoneType))
        and isinstance(start.get("versions"), dict)
        and all(isinstance(version, str) for version in start["versions"].values())
    )


def is_origin(content: dict[str, Any]) -> bool:
    """Whether this is the content of run.json."""
    splits = content["data"].values()
    return has_starts(content) and all(
        isinstance(split["root"], str) and split["images"] and all(map(_is_count, split["images"].values()))
        for split in splits
    )


def is_status(content: dict[str, Any]) -> bool:
    """Whether this is the content of status.json."""
    texts = [content[name] for name in ("status", "message", "time") if name in content]
    counts = [content[name] for name in ("epoch", "step") if name in content]
    return all(isinstance(text, str) for text in texts) and all(map(_is_count, counts))


def is_tested(content: dict[str, Any]) -> bool:
    """Whether this is the content of metrics.json; older versions wrote no origin, root or intervals."""
    values = [value for metrics in content["metrics"].values() for value in metrics.values()]
    return (
        all(value is None or type(value) in (int, float) for value in values)
        and all(re.fullmatch("[a-z_]+", name) for name in content["metrics"])  # part of the tables' file names
        and all(isinstance(content[name], str) for name in ("split", "weights"))
        and isinstance(content.get("root", ""), str)
        and isinstance(content.get("absent_classes", []), list)
        and isinstance(content.get("classes", 0), int)
        and content.get("averaged") in (True, False, None)
        and content.get("heated") in (True, False, None)
        and content["split"] in SPLITS
        and ("origin" not in content or is_start(content["origin"]))
        and all(_is_interval(value) for values in content.get("intervals", {}).values() for value in values.values())
    )


def _is_interval(value: Any) -> bool:
    return value is None or (len(value) == 2 and all(type(bound) in (int, float) for bound in value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
