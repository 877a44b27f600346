"""Running means of an epoch, and the accuracy of a batch."""

from typing import Any

import torch
from torch import Tensor

from utils.runtime import distributed


class RunningMean:
    """Means of named scalars over steps and ranks, summed on the device in float64; only `read` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Start again, with no scalars."""
        self.names: tuple[str, ...] = ()
        self.total = torch.zeros(0, dtype=torch.float64, device=self.device)
        self.count = 0

    def update(self, **values: Tensor) -> None:
        """Add one step; every call gives the same names, with tensors () on the device."""
        if not self.names:
            self.names = tuple(values)
            self.total = torch.zeros(len(values), dtype=torch.float64, device=self.device)
        self.total += torch.stack([values[name].detach() for name in self.names])
        self.count += 1

    def read(self) -> dict[str, float]:
        """The means so far, over all ranks. A collective. Empty before the first update."""
        if not self.count:
            return {}
        means = distributed.all_reduce_mean(self.total / self.count).tolist()
        return dict(zip(self.names, means, strict=True))

    def state(self) -> dict[str, Any]:
        """Names, count, and the totals of each rank (W, n). A collective."""
        totals = torch.stack(distributed.all_gather_object(self.total.cpu()))
        return {"names": list(self.names), "count": self.count, "totals": totals}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()`; on another number of processes each takes the mean of the totals."""
        totals = state["totals"]  # (W, n)
        own = totals[distributed.rank()] if len(totals) == distributed.world_size() else totals.mean(0)
        self.names, self.count, self.total = tuple(state["names"]), state["count"], own.to(self.device)


def batch_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Top-1 accuracy of a batch, a tensor () in [0, 1]. Mixed targets (B, C) count as their largest class."""
    if targets.ndim == 2:
        targets = targets.argmax(1)
    return (logits.argmax(1) == targets).float().mean()
