"""Training losses of the fast settings against plain float32 NCHW, over several seeds.

`python -m benchmarks.curves --data DATA` trains with both scripts for each setting and seed, and compares the ranges of
the losses over the seeds in each window of steps.
"""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from benchmarks.ours import build
from benchmarks.report import describe, environment, show_progress
from benchmarks.setting import Setting
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.processes import run_script
from utils.training.update import GuardedUpdate

Curves = list[list[float]]  # for each seed the mean loss of each window
PLAIN = "float32 NCHW"
VARIANTS: dict[str, list[str]] = {
    PLAIN: ["--no-channels-last"],
    "float32 channels_last": ["--channels-last"],
    "bf16": ["--amp"],
    "compile": ["--compile"],
    "bf16 compile": ["--amp", "--compile"],
}
SCRIPTS: dict[str, ModuleType] = {"_normal": normal, "_policy_gradient": policy_gradient}


class Overlap(NamedTuple):
    """One window of steps: mean and range of the losses over the seeds; whether the range overlaps that of PLAIN."""

    mean: float
    low: float
    high: float
    overlaps: bool


class Recorder:
    """Wraps the script's update: keeps the loss of each step on the device, and ends the loop after `steps`."""

    def __init__(self, update: GuardedUpdate, steps: int) -> None:
        self.update, self.steps = update, steps
        self.losses: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.update, name)

    def __call__(self, loss: Tensor, *arguments: Any) -> Tensor:
        self.losses.append(loss.detach().clone())
        if len(self.losses) == self.steps:
            raise _Enough
        return self.update(loss, *arguments)


def training_losses(script: ModuleType, data: Path, output: Path, steps: int, flags: Sequence[object]) -> list[float]:
    """The first `steps` training losses of a script's real loop over its real loader, epoch after epoch."""
    loop = build(script, data, output, *flags)
    recorder = Recorder(loop.training.update, steps)
    with suppress(_Enough):
        for epoch in range(steps):  # at least one step each
            loop.train_epoch(loop.loader, epoch, recorder)
    return torch.stack(recorder.losses).tolist()


class _Enough(Exception):
    """Enough steps were trained."""


def window_means(losses: Sequence[float], windows: int) -> list[float]:
    """Mean loss in each of `windows` equal windows of steps; a remainder at the front is left out."""
    length = len(losses) // windows
    return np.mean(np.reshape(losses[len(losses) - length * windows :], (windows, length)), axis=1).tolist()


def overlaps(curves: Curves, plain: Curves) -> list[Overlap]:
    """Compare each window of a setting with the same window of the plain one."""
    result = []
    for values, reference in zip(np.transpose(curves), np.transpose(plain), strict=True):  # (seeds,) each
        meets = values.min() <= reference.max() and reference.min() <= values.max()
        result.append(Overlap(values.mean(), values.min(), values.max(), meets))
    return result


def table(script: str, all_curves: dict[str, Curves]) -> list[str]:
    """A line for each setting: mean (min .. max) of each window, `!` where the range does not overlap the plain one."""
    lines = [f"{script}: mean loss over the seeds (min .. max) for each window of steps"]
    for name, curves in all_curves.items():
        windows = overlaps(curves, all_curves[PLAIN])
        texts = (f"{w.mean:.3f} ({w.low:.3f} .. {w.high:.3f}){'' if w.overlaps else '!'}" for w in windows)
        verdict = "overlaps" if all(window.overlaps for window in windows) else "DOES NOT OVERLAP"
        lines.append(f"  {name:<24} {'  '.join(texts)}  {verdict}")
    return lines


def flags_of(script: str, setting: Setting, workers: int) -> list[object]:
    """Flags with small models, which allow many steps: the curves compare arithmetic, not models."""
    model = "resnet18" if script == "_normal" else "resnet10t"
    flags = [*setting.flags(model, workers=workers), "--lr", 0.02]
    return flags if script == "_normal" else [*flags, *setting.policy_flags()]


def build_parser() -> Parser:
    parser = Parser(__doc__.split("\n")[0], prog="python -m benchmarks.curves")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    add("--quick", action="store_true", help="the smallest network on images of 32 pixels")
    add("--data", type=expanded_path, help="DATA/{train,val}/<class>/<image>; default: generated images")
    add("--steps", type=int, default=200, help="steps of each training")
    add("--seeds", type=int, default=3, help="number of trainings per setting")
    add("--windows", type=int, default=5, help="number of equal parts of the steps, each with its mean loss")
    add("--workers", type=int, help="default: 1 on the CPU, 16 on a GPU")
    add("--settings", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    add("--output", type=expanded_path, default=Path("benchmarks/results"), help="folder for the text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print and write the curves; 1 if a setting's losses do not overlap with the plain ones."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = build_parser().parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    workers = options.workers if options.workers is not None else 16 if device.type == "cuda" else 1
    blocks = [describe(environment(device, argv, "benchmarks.curves"))]
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        setting = Setting(device, options.quick, options.data, Path(folder), repeats=1)
        data = options.data or setting.generated()

        def curve(name: str, variant: str, seed: int) -> list[float]:
            flags = [*flags_of(name, setting, workers), *VARIANTS[variant], "--seed", seed]
            losses = training_losses(SCRIPTS[name], data, setting.new_folder("run"), options.steps, flags)
            return window_means(losses, options.windows)

        for name in options.scripts:
            all_curves: dict[str, Curves] = {}
            blocks.append("")
            for variant in dict.fromkeys([PLAIN, *options.settings]):
                show_progress(f"{name}, {variant}")
                all_curves[variant] = [curve(name, variant, seed) for seed in range(options.seeds)]
                blocks[-1] = "\n".join(table(name, all_curves))
                (options.output / f"curves_{device.type}.txt").write_text("\n\n".join(blocks) + "\n")
    print("\n\n".join(blocks))
    return int("DOES NOT OVERLAP" in "".join(blocks))


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
