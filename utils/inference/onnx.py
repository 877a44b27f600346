"""Exports a classifier to ONNX and, where onnxruntime is installed, compares the file with torch."""

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from utils.runtime.errors import UserError, first_line

INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4  # relative to the largest logit, or to 1 if all are smaller
MOST_BYTES = 2_000_000_000  # a protocol buffer holds 2 GiB


def check_packages() -> None:
    """Raise UserError, with their names, if packages that the exporter needs are missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--onnx: needs {' and '.join(missing)}: pip install onnx onnxscript, and onnxruntime to check the file."
        )


def export(model: nn.Module, image_size: int, path: Path) -> str:
    """Write the model, on the CPU and in evaluation mode, for normalised images (B, 3, S, S) with any B.

    Returns a sentence about how closely its logits match torch's. Raises UserError if the model cannot be exported, is
    too large for one file, or gives other logits.
    """
    if sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) > MOST_BYTES:
        raise UserError("--onnx: the model is larger than the 2 GB that an ONNX file can hold; leave the flag out.")
    example = torch.randn(2, 3, image_size, image_size)  # the exporter would fix a batch size of one
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter logs its own passes
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        program.save(path, external_data=False)
    except Exception as error:  # torch.export and the conversion raise many kinds
        raise UserError(f"--onnx: torch cannot export this model ({first_line(error)}); leave the flag out.") from None
    finally:
        logging.disable(level)
    return check(model, image_size, path)


@torch.no_grad()
def check(model: nn.Module, image_size: int, path: Path) -> str:
    """Compare the file's logits with the model's, for random images in batches of 1 and 3."""
    if importlib.util.find_spec("onnxruntime") is None:
        return f"{path.name}: not checked, because onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences = []
    for batch in (1, 3):
        images = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch))
        expected = model(images)
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        differences.append((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max().clamp(min=1))
    largest = torch.stack(differences).max().item()  # NaN if any is
    if not largest <= TOLERANCE:
        raise UserError(
            f"--onnx: the exported logits differ from torch's by {largest:.2g} of the largest logit, more than "
            f"{TOLERANCE:g}; leave the flag out."
        )
    return f"{path.name}: its logits equal torch's within {largest:.1e} of the largest (allowed: {TOLERANCE:g})"
