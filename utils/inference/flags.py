"""The command lines of predict, probe, export and weight_averaging. Imports no torch."""

import argparse
import os

from utils.arguments import model_name
from utils.choices import FORMATS, MASK_POLICIES
from utils.flags import Switch, add_input_flags, natural, positive_float, positive_int, seed
from utils.runtime.command_line import Parser, expanded

JSON, CSV, PICTURE = "probe.json", "probe.csv", "probe.png"


def add_weights_flags(parser: Parser) -> argparse._ArgumentGroup:
    """Add the weight file and the flags for what it may not record; returns the group of these flags."""
    parser.add_argument("file", type=expanded, metavar="WEIGHTS", help="a .pth or .safetensors file")
    parser.add_argument("--use-ema", action=Switch, help="take the moving average of the weights, or the trained "
        "weights; None: the average if the file has one")  # fmt: skip
    group = parser.add_argument_group("for files that do not record it")
    group.add_argument("--model", type=model_name, help="any timm classifier")
    group.add_argument("--classes", type=expanded, metavar="FILE", help="one name per line, or a folder of class "
        "folders")  # fmt: skip
    add_input_flags(group)
    return group


def add_mask_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags of the masks that a heated classifier was trained with."""
    add = group.add_argument
    add("--mask-policy", choices=MASK_POLICIES, help="None: learned if there is a grid")
    add("--grid", type=positive_int, help="cells per side of a heated model's masks")
    add("--kernel", type=positive_int, help="size of their blur, pixels")
    add("--sigma", type=positive_float, help="standard deviation of their blur, pixels")


def predict_parser() -> Parser:
    parser = Parser(
        "Predict the classes of images, with probabilities.", prog="python -m utils.predict", show_defaults=True
    )
    add_weights_flags(parser)
    add = parser.add_argument
    add("images", type=expanded, metavar="IMAGE_OR_FOLDER", nargs="+", help="of a folder all images below it, sorted "
        "by path")  # fmt: skip
    add("--format", default="table", choices=FORMATS, help="table: to read; csv: one column per class; json: one "
        "object per line")  # fmt: skip
    add("--top", type=positive_int, metavar="K", help="only the K most likely classes; None: 3 in a table, else all")
    add("-o", "--output", type=expanded, metavar="FILE", help="written completely or not at all; None: stdout")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("-b", "--batch-size", type=positive_int, default=32, help="images per batch")
    add("-j", "--workers", type=natural, default=min(16, os.cpu_count() or 1), help="processes that read images")
    add("--device", help="cuda or cpu; None: cuda if available")
    add("--bad-images", default="report", choices=("report", "skip", "error"), help="report: name unreadable images "
        "on stderr, predict the others, exit code 2; skip: the same with exit code 0; error: stop at the "
        "first")  # fmt: skip
    return parser


def probe_parser(description: str) -> Parser:
    parser = Parser(description, prog="python -m utils.probe", show_defaults=True)
    add = parser.add_argument
    add("weights", nargs="+", type=expanded, metavar="WEIGHTS", help="files that --finetune reads; the word random "
        "stands for an untrained network of the same model, to compare with")  # fmt: skip
    add("--data-path", type=expanded, required=True, metavar="FOLDER", help="with {train,val,test}/<class>/<image>")
    add("-o", "--output-dir", type=expanded, default="probe", help=f"folder for {JSON}, {CSV}, {PICTURE} and the "
        "features, which later runs reuse")  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing results")
    add("--shots", type=positive_int, nargs="+", metavar="K", help="also fit the probes to K training images of each "
        "class, chosen on K of val")  # fmt: skip
    add("--draws", type=positive_int, default=10, help="random draws for each K of --shots")
    add("--seed", type=seed, default=0, help="seed of the draws, of the bootstrap and of random")
    add("--exclude", type=expanded, metavar="FILE", help="a text file of images to leave out, as of the training")
    add("--bad-images", default="error", choices=("error", "skip"), help="stop at an unreadable image, or skip it")
    add("--max-bad-images", type=natural, default=100, help="with --bad-images skip: more of them end the run")
    add("-b", "--batch-size", type=positive_int, default=32, help="images per batch")
    add("-j", "--workers", type=natural, default=min(16, os.cpu_count() or 1), help="processes that read images")
    add("--device", help="cuda or cpu; None: cuda if available")
    add("--use-ema", action=Switch, help="take the moving average of the weights, or the trained weights; None: the "
        "average if a file has one")  # fmt: skip
    group = parser.add_argument_group(
        "for files that do not record it; flags other than --model --mean --std also replace what a file records"
    )
    group.add_argument("--model", type=model_name, help="any timm classifier")
    add_input_flags(group)
    return parser


def export_parser() -> Parser:
    parser = Parser(
        "Export weights to a folder that timm and the hub can read.",
        prog="python -m utils.export",
        show_defaults=True,
    )
    add_mask_flags(add_weights_flags(parser))
    add = parser.add_argument
    add("-o", "--output", type=expanded, default=".", metavar="FOLDER", help="where to create the new folder; made "
        "if missing")  # fmt: skip
    add("--data-name", help="name of the training data; None: the last part of the training's --data-path")
    add("--license", default="unknown", help="licence of the weights, as the hub names it, such as cc-by-4.0")
    add("--onnx", action="store_true", help="write <name>.onnx too; needs the packages onnx and onnxscript")
    add("--overwrite", action="store_true", help="replace an export of the same name")
    return parser


def averaging_parser(description: str) -> Parser:
    parser = Parser(description, prog="python -m utils.weight_averaging")
    add = parser.add_argument
    add("files", nargs="+", type=expanded, metavar="FILE", help="weights of one model, usually of its last epochs")
    add("-o", "--output", type=expanded, required=True, help="the file to write; --finetune and --test-only read it")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--use-ema", action=Switch, help="average the moving averages of files that have them (the default), or the "
        "trained weights")  # fmt: skip
    return parser
