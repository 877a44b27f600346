"""Pictures of runs: learning curves, the policy's health, confusion matrix, recall of the classes, and calibration.

`python -m utils.plots curves RUN [RUN ...]`, `health RUN [RUN ...]`, and after --test-only `confusion RUN`,
`recall RUN`, `frequency RUN` and `reliability RUN`; for the masks there is `python -m _policy_gradient.gallery RUN`.
Lines differ in colour, style and marker, so that they can be told apart in grey print. Runs that differ only in their
seed share a line, their mean, and a band. Names in Chinese, Japanese or Korean need an installed font that has them,
such as Noto Sans CJK; without one they are drawn as escapes.
"""

from collections.abc import Sequence
from pathlib import Path

from utils.checkpoints.checkpoint import HEATED
from utils.results.confusion import confusion_matrix, per_class_recall, recall_by_frequency
from utils.results.curves import Runs, learning_curves, policy_health
from utils.results.figures import output_path, write_figure
from utils.results.log import LOG, read_log
from utils.results.provenance import same_but_seed
from utils.results.reliability import reliability_diagram
from utils.results.run_folder import describe_tested, read_tested, training_images
from utils.runtime.command_line import Parser, expanded
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.runtime.text import print_line

LOG_PICTURES = {"curves": learning_curves, "health": policy_health}
CLASS_PICTURES = {"confusion": confusion_matrix, "recall": per_class_recall}
TEST_PICTURES = {
    "confusion": "confusion matrix",
    "recall": "recall of each class",
    "frequency": "recall of the classes over their training images",
    "reliability": "accuracy over confidence",
}


def read_logs(folders: Sequence[str]) -> Runs:
    """The logs of these runs. Raises UserError for a folder without a finished epoch."""
    runs = {folder: read_log(Path(folder)) for folder in folders}
    for folder, lines in runs.items():
        if not lines:
            raise UserError(f"{folder}: has no {LOG} with a finished epoch; give the --output-dir of a run.")
    return runs


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m utils.plots")
    commands = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    for name, text in (("curves", "losses, accuracies, learning rates"), ("health", "quantities of the policy")):
        command = commands.add_parser(name, help=f"{text}; several runs are compared")
        command.add_argument("runs", nargs="+", type=expanded, metavar="RUN", help="the --output-dir of a run")
    for name, text in TEST_PICTURES.items():
        command = commands.add_parser(name, help=f"{text}, from the tables of --test-only")
        text = "the folder of predictions.csv and per_class.csv"
        command.add_argument("run", type=expanded, metavar="RUN", help=text)
        command.add_argument("--masked", action="store_true", help="show the evaluation with masks")
    for command in commands.choices.values():
        text = "a .png or .svg file; default: RUN/plots/PICTURE.png, with the evaluated split in the name"
        command.add_argument("-o", "--output", type=expanded, help=text)
        command.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    if options.picture in LOG_PICTURES:
        default = Path(options.runs[0]) / "plots" / f"{options.picture}.png"
        output = output_path(options.output, default, options.overwrite)
        figure = LOG_PICTURES[options.picture](read_logs(options.runs), groups=same_but_seed(options.runs))
    else:
        folder, result = Path(options.run), "masked" if options.masked else "clean"
        (_, table, outcome), tested = read_tested(folder, result)
        name = "_".join([options.picture, tested["split"], *(["masked"] if options.masked else [])])
        output = output_path(options.output, folder / "plots" / f"{name}.png", options.overwrite)
        title = (describe_tested(tested, result), HEATED if tested.get("heated") else "")
        if options.picture == "reliability":
            figure = reliability_diagram(outcome, *title)
        elif options.picture == "frequency":
            figure = recall_by_frequency(outcome.targets, outcome.predictions, training_images(table), *title)
        else:
            classes = [row["class"] for row in table]
            figure = CLASS_PICTURES[options.picture](outcome.targets, outcome.predictions, classes, *title)
    write_figure(output, figure)
    print_line(output)


if __name__ == "__main__":
    run_script(main)
