"""Pictures of runs: learning curves, the policy's health, confusion matrix, recall of the classes, and calibration.

`python -m utils.plots curves RUN [RUN ...]`, `health RUN [RUN ...]`, and after --test-only `confusion RUN`,
`recall RUN`, `frequency RUN` and `reliability RUN`; for the masks there is `python -m _policy_gradient.gallery RUN`.
Lines differ in colour, style and marker, so that they can be told apart in grey print. Runs that differ only in their
seed share a line, their mean, and a band. Names in Chinese, Japanese or Korean need an installed font that has them,
such as Noto Sans CJK; without one they are drawn as escapes.
"""

from collections.abc import Sequence
from pathlib import Path

from utils.arguments import check_command_line
from utils.results.flags import plots_parser
from utils.runtime.processes import run_script

if __name__ == "__main__":
    check_command_line(plots_parser(__doc__))  # --help and misspelt flags need none of the imports below

from utils.checkpoints.checkpoint import HEATED
from utils.results.confusion import confusion_matrix, per_class_recall, recall_by_frequency
from utils.results.curves import Runs, learning_curves, policy_health
from utils.results.figures import output_path, write_figure
from utils.results.log import LOG, read_log
from utils.results.provenance import same_but_seed
from utils.results.reliability import reliability_diagram
from utils.results.run_folder import describe_tested, read_tested, training_images
from utils.runtime.errors import UserError
from utils.runtime.text import print_line

LOG_PICTURES = {"curves": learning_curves, "health": policy_health}
CLASS_PICTURES = {"confusion": confusion_matrix, "recall": per_class_recall}


def read_logs(folders: Sequence[str]) -> Runs:
    """The logs of these runs. Raises UserError for a folder without a finished epoch."""
    runs = {folder: read_log(Path(folder)) for folder in folders}
    for folder, lines in runs.items():
        if not lines:
            raise UserError(f"{folder}: has no {LOG} with a finished epoch; give the --output-dir of a run.")
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    options = plots_parser(__doc__).parse_args(argv)
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
