"""Weights to pass on: `python -m utils.export CHECKPOINT -o _weights` makes a folder that timm and the hub can read.

Its name follows the published files: <model>_gradientp_<data>_<G>_<G>_k<kernel>_s<sigma> for a heated classifier (prior
or uniform in the place of gradientp for these controls), <model>_finetuned_<data> where a training began from weights,
<model>_conventional_<data> where it did not, <model>_<data> where a file of other code does not say. In it are
<name>.safetensors, config.json, README.md (a model card), SHA256SUMS and, with --onnx, <name>.onnx.
"""

import argparse
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import arguments
from utils.checkpoints.checkpoint import Weights, safetensors_bytes
from utils.data.transforms import three_values
from utils.inference import onnx as onnx_file
from utils.inference.classifier import Classifier, add_mask_flags, add_weights_flags, is_heated, open_classifier
from utils.inference.model_card import model_card, read_measured, recipe_flags
from utils.runtime.command_line import expanded
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically, write_json
from utils.runtime.processes import run_script
from utils.runtime.text import print_line
from utils.training.model_sources import plain_name

CPU = torch.device("cpu")
NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
METHODS = {"learned": "gradientp", "prior": "prior", "uniform": "uniform"}


def build_parser() -> arguments.Parser:
    parser = arguments.Parser(
        "Weights to pass on, in a folder that timm and the hub can read.",
        prog="python -m utils.export",
        show_defaults=True,
    )
    add_mask_flags(add_weights_flags(parser))
    add = parser.add_argument
    add("-o", "--output", type=expanded, default=".", metavar="FOLDER", help="where the new folder is made")
    add("--data-name", help="of the training data, for the name; None: that of the file's --data-path")
    add("--license", default="unknown", help="of the weights, as the hub names it: cc-by-4.0, say")
    add("--onnx", action="store_true", help="also <name>.onnx; needs the packages onnx and onnxscript")
    add("--overwrite", action="store_true", help="replace an export of the same name")
    return parser


def export_name(args: argparse.Namespace, weights: Weights, data_name: str) -> str:
    """What the folder and the weights in it are called."""
    model = args.model.split(".")[0]
    if is_heated(args):
        method = METHODS[args.mask_policy or "learned"]
        return f"{model}_{method}_{data_name}_{args.grid}_{args.grid}_k{args.kernel}_s{args.sigma:g}"
    if weights.classes is None:
        return f"{model}_{data_name}"
    began_from_weights = weights.args.get("finetune") or weights.args.get("weights")
    return f"{model}_{'finetuned' if began_from_weights else 'conventional'}_{data_name}"


def choose_data_name(given: str | None, weights: Weights) -> str:
    """Letters, digits, and ._- between them; raises UserError where no name can be made."""
    if given is not None:
        if not re.fullmatch(NAME, given):
            raise UserError(f"--data-name {given}: expected letters and digits, with . _ - between them.")
        return given
    path = weights.args.get("data_path", "")
    if path is None:  # what the scripts do without one
        return "phantoms"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", _last_part(str(path))).strip("._-")
    if not name:
        raise UserError(f"{weights.path}: does not say what data it was trained on; give --data-name NAME.")
    return name


def passed_on(classifier: Classifier) -> dict[str, Any]:
    """The arguments of the training, those that the command line added included; nothing that says where it ran.

    Of paths the last part only: the rest is nobody's business.
    """
    args = classifier.weights.args | {
        name: value
        for name, value in vars(classifier.args).items()
        if name in arguments.MODEL_FLAGS and value is not None
    }
    local = arguments.FREE_ON_RESUME - {"epochs", "finetune"}
    return {
        name: _last_part(value) if isinstance(value, str) else value
        for name, value in args.items()
        if name not in local
    }


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def timm_config(model: nn.Module, args: argparse.Namespace, classes: list[str], weights_file: str) -> dict[str, Any]:
    """config.json as timm reads it from a folder or the hub (`local-dir:`, `hf-hub:`)."""
    defaults = model.pretrained_cfg
    fixed = bool(defaults.get("fixed_input_size"))
    return {
        "architecture": defaults["architecture"],
        "num_classes": len(classes),
        "num_features": model.num_features,
        "label_names": classes,
        "model_args": {"img_size": args.train_crop_size} if fixed else {},
        "pretrained_cfg": {
            "hf_hub_filename": weights_file,
            "input_size": [3, args.val_crop_size, args.val_crop_size],
            "fixed_input_size": fixed,
            "interpolation": args.interpolation,
            "crop_pct": crop_pct(args.val_resize_size, args.val_crop_size),
            "crop_mode": "center",
            "mean": three_values(args.mean),
            "std": three_values(args.std),
            "num_classes": len(classes),
            "first_conv": defaults.get("first_conv"),
            "classifier": defaults.get("classifier"),
        },
    }


def crop_pct(resize_size: int, crop_size: int) -> float:
    """crop_size / resize_size, or a hair less, so that timm's floor(crop_size / crop_pct) gives resize_size."""
    share = crop_size / resize_size
    while math.floor(crop_size / share) < resize_size:
        share = math.nextafter(share, 0)
    return share


def checksums(folder: Path) -> bytes:
    """Of all files in the folder, as `sha256sum -c` reads them."""
    names = sorted(path.name for path in folder.iterdir())
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names).encode()


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UserError for a folder that is there and is not to be replaced, or holds what no export has written."""
    if not target.parent.exists():
        raise UserError(f"--output {target.parent}: no such folder; make it first.")
    if not target.parent.is_dir():
        raise UserError(f"--output {target.parent}: is a file; give the folder to make the new folder in.")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UserError(f"{target}: already exists; give another --output, or --overwrite.")
    ours = {f"{target.name}.safetensors", f"{target.name}.onnx", "config.json", "README.md", "SHA256SUMS"}
    others = sorted({path.name for path in target.iterdir()} - ours) if target.is_dir() else [target.name]
    if others:
        raise UserError(f"{target}: holds {others[0]}, which no export has written; move it away before --overwrite.")


def write_folder(target: Path, classifier: Classifier, data_name: str, license_name: str, with_onnx: bool) -> None:
    """All files, in a folder that appears whole or not at all; what was there, checked before, is replaced."""
    name, (model, classes, args, weights) = target.name, classifier
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
        draft = Path(scratch) / "draft"  # the scratch folder itself is closed to other users
        draft.mkdir()
        weights_file = draft / f"{name}.safetensors"
        write_atomically(weights_file, safetensors_bytes(model, classes, passed_on(classifier)))
        config = timm_config(model, args, classes, weights_file.name)
        write_json(draft / "config.json", config)
        if with_onnx:
            print_line(onnx_file.export(model, args.val_crop_size, draft / f"{name}.onnx"))
        card = model_card(
            name,
            data_name,
            classes,
            args,
            recipe=recipe_flags(passed_on(classifier)),
            measured=read_measured(Path(weights.path), weights.averaged),
            license_name=license_name,
            img_size=config["model_args"].get("img_size"),
            with_onnx=with_onnx,
        )
        write_atomically(draft / "README.md", card)
        write_atomically(draft / "SHA256SUMS", checksums(draft))
        _replace_folder(draft, target, Path(scratch) / "old")


def _replace_folder(draft: Path, target: Path, old: Path) -> None:
    """Put the draft in the place of the target, if there is one; the scratch folder takes that away with it."""
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if replaced:
            old.rename(target)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    given = arguments.parse_given(parser, argv)
    options = arguments.defaults(parser) | given
    if not re.fullmatch(NAME, options["license"]):
        raise UserError(f"--license {options['license']}: expected letters and digits, with . _ - between them.")
    if options["onnx"]:
        onnx_file.check_packages()
    masks = [name for name in ("grid", "kernel", "sigma") if name in given]
    if masks and len(masks) < 3:
        raise UserError(
            f"{arguments.flag(masks[0])}: a heated model has all of --grid, --kernel and --sigma; give all."
        )
    classifier = open_classifier(given, CPU)
    classifier.args.model = plain_name(classifier.args.model)
    data_name = choose_data_name(options["data_name"], classifier.weights)
    target = Path(options["output"]) / export_name(classifier.args, classifier.weights, data_name)
    try:
        check_target(target, options["overwrite"])
        write_folder(target, classifier, data_name, options["license"], options["onnx"])
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); what was there is unharmed.") from None
    print_line(f"{target}: {', '.join(sorted(path.name for path in target.iterdir()))}")


if __name__ == "__main__":
    run_script(main)
