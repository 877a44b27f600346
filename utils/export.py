"""Export weights to a folder that timm and the hub can read: `python -m utils.export CHECKPOINT -o _weights`.

The folder is named like the published files: <model>_gradientp_<data>_<G>_<G>_k<kernel>_s<sigma> for a heated
classifier (prior or uniform instead of gradientp for these controls), <model>_finetuned_<data> for a training that
started from weights, <model>_conventional_<data> for one that did not, and <model>_<data> for a file of other code,
which does not record this. It holds <name>.safetensors, config.json, README.md (a model card), SHA256SUMS and, with
--onnx, <name>.onnx.
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

from utils.arguments import check_command_line
from utils.inference.flags import export_parser
from utils.runtime.processes import run_script

if __name__ == "__main__":
    check_command_line(export_parser())  # --help and misspelt flags need none of the imports below

import torch
from torch import nn

from utils import arguments
from utils.checkpoints.checkpoint import Weights, safetensors_bytes
from utils.data.transforms import three_values
from utils.inference import onnx as onnx_file
from utils.inference.classifier import Classifier, open_classifier
from utils.inference.model_card import model_card
from utils.runtime.errors import UserError
from utils.runtime.files import check_absent, make_parent, write_atomically, write_json
from utils.runtime.text import print_line
from utils.training.model_sources import plain_name

CPU = torch.device("cpu")
NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
GENERIC = {"data", "dataset", "datasets", "images"}  # folder names that say nothing about the data
METHODS = {"learned": "gradientp", "prior": "prior", "uniform": "uniform"}


def export_name(classifier: Classifier, data_name: str) -> str:
    """The name of the folder and of the weights in it."""
    args, weights = classifier.args, classifier.weights
    model = args.model.split(".")[0]
    if classifier.is_heated:
        method = METHODS[args.mask_policy or "learned"]
        return f"{model}_{method}_{data_name}_{args.grid}_{args.grid}_k{args.kernel}_s{args.sigma:g}"
    if weights.classes is None:
        return f"{model}_{data_name}"
    started_from_weights = weights.args.get("finetune") or weights.args.get("weights")
    return f"{model}_{'finetuned' if started_from_weights else 'conventional'}_{data_name}"


def check_name(flag: str, value: str) -> None:
    """Raise UserError for anything but letters, digits, and . _ - between them."""
    if not re.fullmatch(NAME, value):
        raise UserError(f"{flag} {value}: expected letters and digits, with . _ - between them.")


def choose_data_name(given: str | None, weights: Weights) -> str:
    """The value of --data-name, else the last part of the training's --data-path, without special characters.

    Raises UserError for an unfit --data-name, and if the file does not record its data.
    """
    if given is not None:
        check_name("--data-name", given)
        return given
    path = weights.args.get("data_path", "")
    if path is None:  # the scripts then train on phantoms
        return "phantoms"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", _last_part(str(path))).strip("._-")
    if not name:
        raise UserError(f"{weights.path}: does not record its training data; give --data-name NAME.")
    return name


def published_args(classifier: Classifier) -> dict[str, Any]:
    """The training's flags, with those added on the command line, but without those that tell where it ran.

    Paths are cut to their last part, for privacy.
    """
    model_args = {name: value for name, value in vars(classifier.args).items() if name in arguments.MODEL_FLAGS}
    added = {name: value for name, value in model_args.items() if value is not None}
    local = arguments.FREE_ON_RESUME - {"epochs", "finetune"}
    return {
        name: _last_part(value) if isinstance(value, str) else value
        for name, value in (classifier.weights.args | added).items()
        if name not in local
    }


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def timm_config(model: nn.Module, args: argparse.Namespace, classes: list[str], weights_file: str) -> dict[str, Any]:
    """config.json as timm reads it from a folder or the hub (`local-dir:`, `hf-hub:`)."""
    defaults = model.pretrained_cfg
    is_fixed = bool(defaults.get("fixed_input_size"))
    return {
        "architecture": defaults["architecture"],
        "num_classes": len(classes),
        "num_features": model.num_features,
        "label_names": classes,
        "model_args": {"img_size": args.train_crop_size} if is_fixed else {},
        "pretrained_cfg": {
            "hf_hub_filename": weights_file,
            "input_size": [3, args.val_crop_size, args.val_crop_size],
            "fixed_input_size": is_fixed,
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
    """crop_size / resize_size, or slightly less, so that timm's floor(crop_size / crop_pct) gives resize_size."""
    ratio = crop_size / resize_size
    while math.floor(crop_size / ratio) < resize_size:
        ratio = math.nextafter(ratio, 0)
    return ratio


def checksums(folder: Path) -> bytes:
    """The SHA-256 of every file in the folder, as `sha256sum -c` reads them."""
    paths = sorted(folder.iterdir())
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths).encode()


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UserError if the target exists without --overwrite, or holds other files."""
    check_absent(target, overwrite)
    if not os.path.lexists(target):
        return
    ours = {f"{target.name}.safetensors", f"{target.name}.onnx", "config.json", "README.md", "SHA256SUMS"}
    foreign = sorted({path.name for path in target.iterdir()} - ours) if target.is_dir() else [target.name]
    if foreign:
        raise UserError(f"{target}: contains {foreign[0]}, which no export wrote; move it away before --overwrite.")


def write_folder(target: Path, classifier: Classifier, data_name: str, license_name: str, with_onnx: bool) -> None:
    """Write all files into a folder that appears complete or not at all, in place of a previous export.

    Missing folders above it are created.
    """
    name, (model, classes, args, _) = target.name, classifier
    make_parent(target)
    training_args = published_args(classifier)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
        draft = Path(scratch) / "draft"  # other users cannot enter the scratch folder itself
        draft.mkdir()
        weights_file = draft / f"{name}.safetensors"
        write_atomically(weights_file, safetensors_bytes(model, classes, training_args))
        config = timm_config(model, args, classes, weights_file.name)
        write_json(draft / "config.json", config)
        if with_onnx:
            print_line(onnx_file.export(model, args.val_crop_size, draft / f"{name}.onnx"))
        card = model_card(
            name,
            data_name,
            classifier,
            training_args=training_args,
            license_name=license_name,
            img_size=config["model_args"].get("img_size"),
            with_onnx=with_onnx,
        )
        write_atomically(draft / "README.md", card)
        write_atomically(draft / "SHA256SUMS", checksums(draft))
        _replace_folder(draft, target, Path(scratch) / "old")


def _replace_folder(draft: Path, target: Path, old: Path) -> None:
    """Rename the draft to the target. A previous target moves to `old`, and back if the renaming fails."""
    is_replaced = target.exists()
    if is_replaced:
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if is_replaced:
            old.rename(target)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    parser = export_parser()
    given = arguments.parse_given(parser, argv)
    options = arguments.defaults(parser) | given
    check_name("--license", options["license"])
    if options["onnx"]:
        onnx_file.check_packages()
    masks = [name for name in ("grid", "kernel", "sigma") if name in given]
    if masks and len(masks) < 3:
        raise UserError(f"{arguments.flag(masks[0])}: a heated model has --grid, --kernel and --sigma; give all three.")
    classifier = open_classifier(given, CPU)
    classifier.args.model = plain_name(classifier.args.model)
    data_name = choose_data_name(options["data_name"], classifier.weights)
    if options["data_name"] is None and data_name.lower() in GENERIC:
        print_line(f"the data set is called {data_name}, after its folder; --data-name NAME gives a better name")
    target = Path(options["output"]) / export_name(classifier, data_name)
    try:
        check_target(target, options["overwrite"])
        write_folder(target, classifier, data_name, options["license"], options["onnx"])
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); what was there is unharmed.") from None
    print_line(f"{target}: {', '.join(sorted(path.name for path in target.iterdir()))}")


if __name__ == "__main__":
    run_script(main)
