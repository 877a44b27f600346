"""Collect the finished runs of a plan in one compressed file: `python experiments/collect.py PLAN RESULTS`.

The file holds all that analyse.py needs, image by image, and can be given to it in place of the folder of runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.plan import read_plan
from experiments.results_file import pack
from experiments.run_results import read_folders
from experiments.tasks import read_tasks
from utils.arguments import check_limits
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.files import check_absent, make_parent, write_atomically
from utils.runtime.processes import run_script
from utils.runtime.text import print_line


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python experiments/collect.py")
    add = parser.add_argument
    add("plan", type=expanded_path, metavar="PLAN", help="such as experiments/plans/small.py")
    add("results", type=expanded_path, metavar="RESULTS", help="the output folder of its runs")
    add("-o", "--output", type=expanded_path, metavar="FILE",
        help="default: experiments/results/<plan's name>/runs.npz")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an existing file")
    options = parser.parse_args(argv)
    check_limits(vars(options))
    plan = read_plan(options.plan)
    output = options.output or ROOT / "experiments" / "results" / plan.name / "runs.npz"
    check_absent(output, options.overwrite)
    results = read_folders(plan, options.results)
    read_tasks(plan, results.runs)  # raises UserError if arms of a seed were tested on different images
    make_parent(output)
    data = pack(plan, results)
    write_atomically(output, data)
    print_line(f"{output}: {len(results.runs)} of {len(plan.runs())} runs of {plan.name}, {len(data) / 1e6:.2f} MB")


if __name__ == "__main__":
    run_script(main)
