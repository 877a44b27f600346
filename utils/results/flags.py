"""The command lines of plots and report. Imports no torch."""

from utils.runtime.command_line import Parser, expanded, expanded_path

TEST_PICTURES = {
    "confusion": "confusion matrix",
    "recall": "recall of each class",
    "frequency": "recall of the classes over their training images",
    "reliability": "accuracy over confidence",
}


def plots_parser(description: str) -> Parser:
    parser = Parser(description, prog="python -m utils.plots")
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


def report_parser(description: str) -> Parser:
    parser = Parser(description, prog="python -m utils.report")
    parser.add_argument("outputs", nargs="+", type=expanded_path, metavar="OUTPUT", help="the --output-dir of a run")
    parser.add_argument("-o", "--output", type=expanded_path, help="an .html file, replaced each time; "
        "default: report.html in the folder of a single run, or in the current folder for several")  # fmt: skip
    return parser
