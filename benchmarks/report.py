"""What a benchmark says: measurements with their target, machine, versions, command and date; as tables and JSON."""

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

PACKAGES = ("torch", "torchvision", "timm", "pillow")
NOT_MEASURED = "not measured yet"
COLUMNS = ("#", "what", "ours", "theirs", "units", "ratio", "spread", "target", "met", "repeats")


class Target(NamedTuple):
    """What issue 4 asks of the ratio, or, for memory, of our own value."""

    at_least: bool
    value: float
    of_ours: bool = False

    def is_met(self, ratio: float, ours: float) -> bool:
        value = ours if self.of_ours else ratio
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{'ours ' if self.of_ours else ''}{'>=' if self.at_least else '<='} {self.value:g}"


@dataclass(frozen=True)
class Measurement:
    """One line of the table. `ours`, `theirs` and `ratio` are medians; all None where nothing was measured."""

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
    """A line with its numbers; no target for a variant that is there to compare with."""
    ours, theirs, ratio, low, high, repeats = comparison
    met = None if target is None else target.is_met(ratio, ours)
    return Measurement(
        number, what, units, str(target or "-"), ours, theirs, ratio, (low, high), met, repeats, note
    )  # fmt: skip


def not_measured(number: int, what: str, units: str, target: Target | None, note: str) -> Measurement:
    """A line that says that nothing was measured, and why."""
    return Measurement(number, what, units, str(target or "-"), note=note)


def environment(device: torch.device, arguments: Sequence[str], module: str = "benchmarks.run") -> dict[str, object]:
    """Hardware, versions, command and date, which go with every line."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a build that was not installed by pip
            versions[package] = "unknown"
    return {
        "hardware": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": versions,
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": date.today().isoformat(),
    }


def cpu_model() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cells(row: Measurement) -> list[str]:
    """A line's texts, one for each of COLUMNS."""
    if row.ratio is None:
        numbers = [NOT_MEASURED, "", row.units, "", ""]
    else:
        low, high = row.spread
        numbers = [_short(row.ours), _short(row.theirs), row.units, f"{row.ratio:.3g}", f"{low:.3g} .. {high:.3g}"]
    met = "" if row.met is None else "yes" if row.met else "no"
    return [str(row.number), row.what, *numbers, row.target, met, str(row.repeats or "")]


def _short(value: float) -> str:
    """Four digits, and no exponent for what is read by people."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def text_table(rows: Sequence[Measurement]) -> str:
    """Columns in line, a note below its row."""
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
    """The same as Markdown, the notes as a list below."""
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
    return f"{processor}{gpu}\n{packages}\n`{where['command']}`, {where['date']}"


def write(output: Path, name: str, rows: Sequence[Measurement], where: dict[str, object]) -> None:
    """results_<name>.txt, .md and .json in the output folder; every line of the JSON stands alone."""
    output.mkdir(parents=True, exist_ok=True)
    header = describe(where)
    (output / f"results_{name}.txt").write_text(f"{header}\n\n{text_table(rows)}\n")
    (output / f"results_{name}.md").write_text(f"{markdown_table(rows)}\n\n{header}\n")
    lines = [asdict(row) | where for row in rows]
    (output / f"results_{name}.json").write_text(json.dumps(lines, indent=2) + "\n")


def show_progress(message: str) -> None:
    """What is being measured right now, apart from the table on stdout."""
    print(message, file=sys.stderr, flush=True)
