"""The settings of a training loop."""

from typing import NamedTuple

import torch
from torch import Tensor


class LoopSettings(NamedTuple):
    """What the loops of both scripts need besides networks and data.

    backbone_frozen: only the head is in training mode. micro_batches: the number that a batch is split into.
    class_weights: (C,) on the device, of the classifier's loss.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None
    label_smoothing: float
    epochs: int
    print_freq: int
    backbone_frozen: bool = False
    label: str = "epoch"
    micro_batches: int = 1
    class_weights: Tensor | None = None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)
