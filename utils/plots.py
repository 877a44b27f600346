"""Pictures of a run: learning curves, the policy's health, confusion matrix and recall of each class.

`python -m utils.plots curves RUN [RUN ...]`, `health RUN [RUN ...]`, `confusion RUN` and `recall RUN`; the masks are
shown by `python -m _policy_gradient.gallery RUN`. Lines differ in colour (Okabe and Ito's, told apart by the
colour-blind), style and marker, so that grey print shows them too.
"""

from collections.abc import Sequence
from pathlib import Path

from utils.results.confusion import confusion_matrix, per_class_recall
from utils.results.curves import Runs, learning_curves, policy_health
from utils.results.figures import output_path, write_figure
from utils.results.log import LOG, read_log
from utils.results.run_folder import read_tested
from utils.runtime.command_line import Parser, expanded
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.runtime.text import print_line


def read_runs(folders: Sequence[str]) -> Runs:
    """The logs of these runs; raises UserError for a folder without one."""
    try:
        runs = {folder: read_log(Path(folder)) for folder in folders}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}).") from None
    for folder, lines in runs.items():
        if not lines:
            raise UserError(f"{folder}: has no {LOG} with a finished epoch; name the --output-dir of a run.")
    return runs


LOG_PICTURES = {"curves": learning_curves, "health": policy_health}
CLASS_PICTURES = {"confusion": confusion_matrix, "recall": per_class_recall}


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m utils.plots")
    commands = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    for name, text in (("curves", "losses, accuracies, learning rates"), ("health", "of the policy")):
        command = commands.add_parser(name, help=f"{text}; several runs are compared")
        command.add_argument("runs", nargs="+", type=expanded, metavar="RUN", help="the --output-dir of a run")
    for name, text in (("confusion", "matrix of the classes"), ("recall", "of each class")):
        command = commands.add_parser(name, help=f"{text}, from what --test-only wrote")
        command.add_argument(
            "run", type=expanded, metavar="RUN", help="the folder of predictions.csv and per_class.csv"
        )
        command.add_argument("--masked", action="store_true", help="of the evaluation with masks")
    for command in commands.choices.values():
        command.add_argument(
            "-o", "--output", type=expanded, help="a .png or .svg file; default: RUN/plots/PICTURE.png"
        )
        command.add_argument("--overwrite", action="store_true", help="write over a file that is there already")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    of_log = options.picture in LOG_PICTURES
    folder = Path(options.runs[0] if of_log else options.run)
    name = options.picture if of_log or not options.masked else f"{options.picture}_masked"
    output = output_path(options.output, folder / "plots" / f"{name}.png", options.overwrite)
    if of_log:
        figure = LOG_PICTURES[options.picture](read_runs(options.runs))
    else:
        (_, table, outcome), what = read_tested(folder, "masked" if options.masked else "clean")
        classes = [row["class"] for row in table]
        figure = CLASS_PICTURES[options.picture](outcome.targets, outcome.predictions, classes, what)
    write_figure(output, figure)
    print_line(output)


if __name__ == "__main__":
    run_script(main)
