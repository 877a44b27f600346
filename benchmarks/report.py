"""Measurements with target, machine, versions, command and date, as tables and JSON."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import Comparison
from utils.results.git import commit_of

PACKAGES = ("torch", "torchvision", "timm", "pillow")
NOT_MEASURED = "not measured yet"
COLUMNS = ("#", "what", "ours", "theirs", "units", "ratio", "spread", "target", "met", "repeats")


class Target(NamedTuple):
    """The required bound on a ratio, a minimum (`at_least`) or a maximum."""

    at_least: bool
    value: float

    def is_met(self, ratio: float) -> bool:
        return ratio >= self.value if self.at_least else ratio <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


@dataclass(frozen=True)
class Measurement:
    """One line of the table. `ours`, `theirs` and `ratio` are medians; all are None if nothing was measured."""

    number: int
    what: str
    units: str
    target: str
    ours: float | None = None
    theirs: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    met: bool | None = None
    repeats: int = 0
    note: str = ""


def measured(
    number: int, what: str, units: str, comparison: Comparison, target: Target | None, note: str = ""
) -> Measurement:
    """A line with its numbers; target None for a variant that is shown only for comparison."""
    ours, theirs, ratio, low, high, repeats = comparison
    met = None if target is None else target.is_met(ratio)
    return Measurement(number, what, units, str(target or "-"), ours, theirs, ratio, (low, high), met, repeats, note)


def not_measured(number: int, what: str, units: str, target: Target | None, note: str) -> Measurement:
    """A line without numbers; the note gives the reason."""
    return Measurement(number, what, units, str(target or "-"), note=note)


def environment(device: torch.device, arguments: Sequence[str], module: str = "benchmarks.run") -> dict[str, object]:
    """Hardware, versions, commit, command and date, which accompany every line."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a build that pip did not install
            versions[package] = "unknown"
    return {
        "hardware": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": versions,
        "commit": commit_of(Path(__file__)),
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": date.today().isoformat(),
    }


def cpu_model() -> str:
    """The processor's name according to Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cells(row: Measurement) -> list[str]:
    """The texts of a line, one for each of COLUMNS."""
    if row.ratio is None:
        numbers = [NOT_MEASURED, "", row.units, "", ""]
    else:
        low, high = row.spread
        numbers = [_short(row.ours), _short(row.theirs), row.units, f"{row.ratio:.3g}", f"{low:.3g} .. {high:.3g}"]
    met = "" if row.met is None else "yes" if row.met else "no"
    return [str(row.number), row.what, *numbers, row.target, met, str(row.repeats or "")]


def _short(value: float) -> str:
    """Four significant digits, and no exponent for large numbers."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def text_table(rows: Sequence[Measurement]) -> str:
    """Aligned columns, each note below its row."""
    table = [list(COLUMNS), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    lines = []
    for row, texts in zip([None, *rows], table, strict=True):
        padded = (text.ljust(width) for text, width in zip(texts, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
        if row is not None and row.note:
            lines.append(f"{'':{widths[0]}}    {row.note}")
    return "\n".join(lines)


def markdown_table(rows: Sequence[Measurement]) -> str:
    """The same table as Markdown, with the notes in a list below."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    notes = [f"- {row.number}, {row.what}: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, "", *notes] if notes else lines)


def describe(where: dict[str, object]) -> str:
    """The environment in three lines."""
    hardware, versions = where["hardware"], where["versions"]
    processor = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads"
    gpu = f"; {hardware['gpu']}" if hardware["gpu"] else ""
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{processor}{gpu}\n{packages}\n`{where['command']}`, commit {where['commit']}, {where['date']}"


def write(output: Path, name: str, rows: Sequence[Measurement], where: dict[str, object]) -> None:
    """Writes results_<name>.txt, .md and .json; each JSON entry repeats the environment."""
    output.mkdir(parents=True, exist_ok=True)
    header = describe(where)
    (output / f"results_{name}.txt").write_text(f"{header}\n\n{text_table(rows)}\n")
    (output / f"results_{name}.md").write_text(f"{markdown_table(rows)}\n\n{header}\n")
    lines = [asdict(row) | where for row in rows]
    (output / f"results_{name}.json").write_text(json.dumps(lines, indent=2) + "\n")


def show_progress(message: str) -> None:
    """Print to stderr, so that stdout holds only the tables."""
    print(message, file=sys.stderr, flush=True)
