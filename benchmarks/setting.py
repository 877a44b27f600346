"""Common settings of all rows: device, sizes, images, number of repeats."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import Work, interleaved, synchronizer
from utils.phantoms import dataset as phantoms

FULL_POLICY = {"grid": 64, "kernel": 13, "sigma": 6.0}
QUICK_POLICY = {"grid": 8, "kernel": 5, "sigma": 2.0}


@dataclass(frozen=True)
class Setting:
    """What the rows are measured with.

    quick: tiny networks, images and counts, only to check that everything runs; data: real images in
    DATA/train/<class>/<image>, None for generated ones; work: a folder for intermediate files, removed at the end.
    """

    device: torch.device
    quick: bool
    data: Path | None
    work: Path
    repeats: int

    @property
    def size(self) -> int:
        """The side of a crop, pixels."""
        return 32 if self.quick else 224

    @property
    def batch_size(self) -> int:
        return 8 if self.quick else 32

    @property
    def policy(self) -> dict[str, float]:
        """grid, kernel and sigma of the masks."""
        return QUICK_POLICY if self.quick else FULL_POLICY

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def model(self, name: str) -> str:
        """The given model, or the smallest one with `quick`."""
        return "test_resnet" if self.quick else name

    def flags(self, model: str, batch_size: int | None = None, workers: int = 0) -> list[object]:
        """Command-line flags for either script; everything else keeps its default."""
        flags = {
            "--device": self.device.type,
            "--model": self.model(model),
            "--workers": workers,
            "--batch-size": batch_size or self.batch_size,
            "--train-crop-size": self.size,
            "--val-resize-size": self.size * 8 // 7,
            "--val-crop-size": self.size,
            "--lr": 1e-3,
        }
        return [word for flag in flags.items() for word in flag]

    def policy_flags(self) -> list[object]:
        """Additional flags for `_policy_gradient`."""
        masks = [word for name, value in self.policy.items() for word in (f"--{name}", value)]
        return ["--policy-model", self.model("resnet10t"), *masks]

    def generated(self) -> Path:
        """Generated images, for rows in which only their shape matters; made once."""
        root = self.work / "phantoms"
        if not root.exists():
            phantoms.generate(root, size=64, scale=0.05 if self.quick else 0.3)  # small, so that this is quick
        return root

    def new_folder(self, name: str) -> Path:
        """A path that does not exist yet, for the files of a run."""
        number = len(list(self.work.glob(f"{name}-*")))
        return self.work / f"{name}-{number}"

    def time(self, sides: Mapping[str, Work], warmups: int = 2, repeats: int | None = None) -> dict[str, list[float]]:
        """Seconds of each side at each repeat; repeats None: `self.repeats`."""
        warmups = 1 if self.quick else warmups
        wait = synchronizer(self.device)
        return interleaved(sides, repeats or self.repeats, warmups=warmups, synchronize=wait)

    def steps(self, on_cpu: int, on_gpu: int) -> int:
        """Number of training steps in one repeat."""
        if self.quick:
            return 2
        return on_gpu if self.on_gpu else on_cpu
