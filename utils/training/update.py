"""One training step, checked on all ranks: non-finite losses, stop requests, and the guarded update."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.signals import StopRequest
from utils.training.optim import MovingAverage

ADVICE = "Resuming repeats the failure: start a new run with a lower --lr, --clip-grad-norm, or --amp-dtype bf16."
LAG = 2  # steps on CUDA between the collective of a stop request and its reading, so that the queue stays full


class NonFiniteLoss(UserError):
    """A loss was not finite. `batch`: for each rank, whether its loss was finite, and the paths of its images."""

    def __init__(self, message: str, batch: list[dict]) -> None:
        super().__init__(message, agreed=True)
        self.batch = batch


class StepGuard:
    """The one collective of a step besides the gradients': whether a loss is non-finite or a rank must stop, and means.

    `exchange` never waits for the device. `raise_if_non_finite` does; it is called at print steps and before saves.
    """

    def __init__(self, device: torch.device, path: Callable[[int], Path], stop: StopRequest) -> None:
        """path: the file of an image, by its index, for the report of a batch."""
        self.path, self.stop = path, stop
        self.lag = LAG if device.type == "cuda" else 0
        # By step, since the last `raise_if_non_finite`: whether a loss was non-finite on any rank, and on this rank,
        # both bool () on the device; and the indices (B,) of this rank's images.
        self.recent: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        # Whether any rank has to stop, bool () on the host once the event has happened; for the last `lag` steps.
        self.stops: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.flags = {flag: torch.tensor(flag, device=device) for flag in (False, True)}

    def exchange(
        self, loss: Tensor, step: int, indices: Tensor, means: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Whether the loss () is non-finite on any rank, a bool tensor (); and `means`, averaged over the ranks.

        Both are equal on all ranks. loss: or any number that is finite only with it; indices: (B,), this rank's images,
        on the CPU; means: of this rank's batch, any shapes.
        """
        loss = loss.detach()
        non_finite = (loss - loss) != 0  # inf - inf is NaN, and NaN != 0; two kernels instead of the five of isfinite
        own = [non_finite, self.flags[self.stop.is_pending], *means]
        any_non_finite, stop, *means = distributed.combine(own)
        self.recent[step] = any_non_finite, non_finite, indices
        self.stops.append(_copy_behind(stop) if stop.is_cuda else (stop, None))
        return any_non_finite, means

    def stop_agreed(self) -> bool:
        """Whether any rank has to stop (see `StopRequest`); equal on all ranks. To be called once per step."""
        if len(self.stops) <= self.lag:
            return False
        stop, event = self.stops.popleft()
        if event is not None:
            event.synchronize()
        return bool(stop)

    def raise_if_non_finite(self, epoch: int) -> None:
        """Raise NonFiniteLoss, on all ranks together, if a loss was non-finite."""
        flags = torch.stack([flag for flag, _, _ in self.recent.values()]).tolist() if self.recent else []
        if not any(flags):
            self.recent.clear()
            return
        step = list(self.recent)[flags.index(True)]
        _, non_finite, indices = self.recent[step]
        batch = {
            "rank": distributed.rank(),
            "loss_is_finite": not non_finite.item(),
            "images": [str(self.path(index)) for index in indices.tolist()],
        }
        raise NonFiniteLoss(
            f"the loss was not finite at epoch {epoch}, step {step}; that update was skipped, and nothing has been "
            f"saved since. {ADVICE}",
            distributed.all_gather_object(batch),
        )


def _copy_behind(flag: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A pinned copy on the host, complete once the event has happened; nothing waits here."""
    copied, event = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    return copied, event


SMALLEST_SCALE = 2.0**-14  # of the fp16 gradient scaler: below it, every step has been overflowing


class GuardedUpdate:
    """Backward pass, clipping and step of one or more optimisers; a skipped step changes nothing.

    A step is skipped for all networks together if a loss is non-finite, or if a
    gradient is non-finite where gradients are measured anyway (by the fp16 scaler or for clipping). Where gradients are
    measured, skipped steps are counted on the device (`skipped_steps`) and the BatchNorm statistics that the forward
    passes changed are restored. Fused optimisers read the flag on the device; rmsprop has no fused form, so there the
    host waits for it.
    """

    def __init__(
        self,
        optimizers: dict[str, Optimizer],
        device: torch.device,
        fp16: bool = False,
        clip_grad_norm: float | None = None,
        networks: Iterable[nn.Module] = (),
        ema: MovingAverage | None = None,
    ) -> None:
        """optimizers: by the name of the network that each updates; networks: those with buffers to restore.

        ema: updated after each step that is not skipped.
        """
        self.optimizers, self.ema = optimizers, ema
        self.clip_grad_norm = clip_grad_norm
        self.fp16 = fp16
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.accumulating = False  # whether there are gradients of earlier micro-batches of this step
        self.measures_gradients = fp16 or clip_grad_norm is not None
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in (buffer for network in networks for buffer in network.buffers()):
            self.buffers.setdefault(buffer.dtype, []).append(buffer)
        self.buffers_before: dict[torch.dtype, Tensor] = {}

    def begin_step(self) -> None:
        """Keep the buffers that the forward passes of a step will change. To be called before them."""
        if self.measures_gradients:
            self.buffers_before = {dtype: _flat(buffers) for dtype, buffers in self.buffers.items()}

    def accumulate(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch's share () of the loss; the last one goes to `__call__`."""
        if not self.accumulating:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
        self.accumulating = True
        self.scaler.scale(loss).backward()

    def __call__(self, loss: Tensor, non_finite: Tensor, epoch: int = 0, step: int = 0) -> Tensor:
        """One update from a loss (), or from the last micro-batch's share of it; returns whether it was skipped.

        non_finite: whether the loss of any rank is; it and the result are bool tensors () on the device, equal on all
        ranks; epoch, step: for the moving average.
        """
        self.accumulate(loss)
        self.accumulating = False
        skipped = non_finite
        if self.measures_gradients:
            for optimizer in self.optimizers.values():
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                self.scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm or math.inf)
                skipped = skipped | ~norm.isfinite()
            self._restore_buffers(skipped)
        for optimizer in self.optimizers.values():
            _step(optimizer, skipped)
        self.skipped_steps += skipped
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(epoch, step, skipped)
        return skipped

    def _restore_buffers(self, skipped: Tensor) -> None:
        """Restore the buffers kept by `begin_step` if the step was skipped."""
        for dtype, buffers in self.buffers.items():
            kept = torch.where(skipped, self.buffers_before[dtype], _flat(buffers))  # few kernels, not one a buffer
            parts = kept.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])

    def state(self) -> dict:
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {
            "optimizers": optimizers,
            "scaler": self.scaler.state_dict(),
            "skipped_steps": int(self.skipped_steps),
        }

    def load_state(self, state: dict, source: str) -> None:
        """Restore `state()`, but keep the learning rates that the rebuilt schedules have set.

        Raises UserError if the state belongs to other optimisers or parameters.
        """
        for name, optimizer in self.optimizers.items():
            rates = [(group["lr"], group["initial_lr"]) for group in optimizer.param_groups]
            try:
                optimizer.load_state_dict(state["optimizers"][name])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{source}: its {name} optimiser's state does not fit this run ({error}).") from None
            for group, (lr, initial_lr) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"], group["initial_lr"] = lr, initial_lr
            _lay_out_as_parameters(optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.skipped_steps.fill_(state["skipped_steps"])

    def read_skipped(self) -> dict[str, int]:
        """For the log: the number of skipped steps since the run began; empty if gradients are not measured."""
        return {"skipped_steps": int(self.skipped_steps)} if self.measures_gradients else {}

    def raise_if_collapsed(self) -> None:
        """Raise UserError if the fp16 scale has collapsed: every step overflows and nothing is learned."""
        if self.fp16 and self.scaler.get_scale() < SMALLEST_SCALE:
            raise UserError(
                "the fp16 gradient scale has fallen below 2^-14: every step overflows. Lower --lr or use bf16.",
                agreed=True,
            )


def _flat(tensors: list[Tensor]) -> Tensor:
    """The tensors of one dtype, flattened and concatenated to (N,)."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _step(optimizer: Optimizer, skipped: Tensor) -> None:
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
        optimizer.step()
    elif not skipped.item():
        optimizer.step()


def _lay_out_as_parameters(optimizer: Optimizer) -> None:
    """Give restored buffers the memory format of their parameters, as the fused kernels require."""
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if isinstance(buffer, Tensor) and buffer.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter).copy_(buffer)
