"""What all ranks agree on at each training step, without waiting for the device."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.signals import StopRequest

ADVICE = "Resumed, a run repeats itself: start a new one with a lower --lr, --clip-grad-norm, or --amp-dtype bf16."
LAG = 2  # steps on CUDA between a stop's collective and the host reading it: so many stay queued on the device


class NonFiniteLoss(UserError):
    """A loss was not finite; `batch`: for each rank, whether its loss was finite, and the paths of its images."""

    def __init__(self, message: str, batch: list[dict]) -> None:
        super().__init__(message, agreed=True)
        self.batch = batch


class StepGuard:
    """One small collective a step: is a loss not finite on any rank, and does any rank want to stop?

    `check` never waits for the device. `raise_if_found` does, and is meant for print steps and for before a save.
    """

    def __init__(self, device: torch.device, path: Callable[[int], Path], stop: StopRequest) -> None:
        """path: of an image by its index, for the report of a batch."""
        self.path, self.stop = path, stop
        self.lag, self._to_host = (LAG, _copy_behind) if device.type == "cuda" else (0, lambda flag: (flag, None))
        # By step, since `raise_if_found` last found nothing: was a loss not finite on any rank, and on this one, both
        # bool () on the device, and this rank's indices (B,).
        self.recent: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.stops: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.wishes = {wish: torch.tensor(wish, device=device) for wish in (False, True)}

    def check(self, loss: Tensor, step: int, indices: Tensor) -> Tensor:
        """True, as a bool tensor () equal on all ranks, if the loss () of this step is not finite on some rank.

        indices: (B,), of this rank's images, on the CPU.
        """
        loss = loss.detach()
        own = (loss - loss) != 0  # NaN, unlike 0, where it is not finite; two kernels, where isfinite takes five
        flags = torch.stack([own, self.wishes[self.stop.asked is not None]])
        found, stop = (distributed.all_reduce_sum(flags.float()) > 0).unbind()
        self.recent[step] = found, own, indices
        self.stops.append(self._to_host(stop))
        return found

    def stop_agreed(self) -> bool:
        """True, on all ranks after the same step, if a signal asked any of them to stop; call it once a step."""
        if len(self.stops) <= self.lag:
            return False
        stop, event = self.stops.popleft()
        if event is not None:
            event.synchronize()
        return bool(stop)

    def raise_if_found(self, epoch: int) -> None:
        """Raise NonFiniteLoss, on all ranks at once, if a loss was not finite."""
        found = torch.stack([found for found, _, _ in self.recent.values()]).tolist() if self.recent else []
        if not any(found):
            self.recent.clear()
            return
        step = list(self.recent)[found.index(True)]
        _, own, indices = self.recent[step]
        own = {
            "rank": distributed.rank(),
            "loss_is_finite": not own.item(),
            "images": [str(self.path(index)) for index in indices.tolist()],
        }
        raise NonFiniteLoss(
            f"the loss was not finite at epoch {epoch}, step {step}; that update was held back, and nothing was saved "
            f"since. {ADVICE}",
            distributed.all_gather_object(own),
        )


def _copy_behind(flag: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy on the host, pinned, that is there once the event has happened; nothing waits now."""
    copied, event = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    return copied, event
