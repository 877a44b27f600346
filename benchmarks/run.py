"""All rows of the speed table: `python -m benchmarks.run`, see benchmarks/README.md."""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import evaluating, loading, memory, saving, steps
from benchmarks.report import Measurement, describe, environment, not_measured, show_progress, text_table, write
from benchmarks.setting import Setting
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.processes import run_script

ROWS: dict[int, Callable[[Setting], Iterable[Measurement]]] = {
    1: steps.smooth_mask,
    2: steps.policy_price,
    3: steps.against_published,
    4: steps.plain_step,
    5: loading.cached_training,
    6: loading.first_epoch,
    7: loading.cached_epoch,
    8: memory.host_memory,
    9: evaluating.evaluation,
    10: steps.pathwise_price,
    11: saving.checkpoint_pause,
}


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m benchmarks.run")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to check that everything runs")
    parser.add_argument("--rows", type=int, nargs="+", choices=sorted(ROWS), default=sorted(ROWS))
    parser.add_argument("--repeats", type=int, help="per row; default: 9, or 2 with --quick")
    parser.add_argument("--data", type=expanded_path, help="real images in DATA/train/<class>; default: generated ones")
    parser.add_argument(
        "--output", type=expanded_path, default=Path("benchmarks/results"), help="folder for the tables"
    )
    return parser


def measure(number: int, setting: Setting) -> Iterator[Measurement]:
    """Yields the lines of one row. An error becomes a line that reports it, so that the other rows still run."""
    start = time.perf_counter()
    try:
        for line in ROWS[number](setting):
            yield replace(line, met=None) if setting.quick else line  # targets do not apply to --quick
            show_progress(f"row {number}: {line.what}: {time.perf_counter() - start:.0f} s")
    except Exception as error:
        traceback.print_exc()
        yield not_measured(number, ROWS[number].__doc__.split("\n")[0], "", None, f"failed: {error}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the tables; returns 1 if a row failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = build_parser().parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    where = environment(device, argv)
    rows: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        repeats = options.repeats or (2 if options.quick else 9)
        setting = Setting(device, options.quick, options.data, Path(folder), repeats)
        for number in options.rows:
            for line in measure(number, setting):
                rows.append(line)
                write(options.output, device.type, rows, where)  # after each line, so that a crash loses nothing
    print(f"{describe(where)}\n\n{text_table(rows)}")
    return int(any(row.note.startswith("failed:") for row in rows))


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
