"""Optimisers, schedules, the guarded update, and the moving average of the weights."""

import math
import warnings
from collections.abc import Iterable

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)

from utils.runtime.errors import UserError

OPTIMIZERS = ("sgd", "sgd_nesterov", "rmsprop", "adamw")
SCHEDULERS = ("steplr", "cosineannealinglr", "exponentiallr")
WARMUPS = ("linear", "constant")
EMBEDDINGS = ("cls_token", "dist_token", "reg_token", "pos_embed", "relative_position_bias_table")  # timm's names
SMALLEST_SCALE = 2.0**-14  # of the fp16 gradient scaler: below it, every step has been overflowing


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
    transformer_embedding_decay: float | None = None,
) -> list[dict]:
    """Parameter groups of the parameters that learn, by weight decay; None means the same as the others.

    As in torchvision's reference: embeddings by name first, then biases, then what belongs to a normalisation layer.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            decay = weight_decay
            if transformer_embedding_decay is not None and name in EMBEDDINGS:
                decay = transformer_embedding_decay
            elif bias_weight_decay is not None and name == "bias":
                decay = bias_weight_decay
            elif norm_weight_decay is not None and _is_norm(module):
                decay = norm_weight_decay
            groups.setdefault(decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def _is_norm(module: nn.Module) -> bool:
    """True for BatchNorm2d, LayerNorm, GroupNorm, timm's RmsNorm and the like, which share no base class."""
    return "norm" in type(module).__name__.lower()


def build_optimizer(name: str, groups: list[dict], lr: float, momentum: float) -> Optimizer:
    """sgd, sgd_nesterov, rmsprop (eps .0316, alpha .9, as torchvision's reference) or adamw; fused where torch can."""
    if name == "adamw":
        return AdamW(groups, lr=lr, fused=True)
    if name == "rmsprop":
        return RMSprop(groups, lr=lr, momentum=momentum, eps=0.0316, alpha=0.9)
    optimizer = SGD(groups, lr=lr, momentum=momentum, nesterov=name == "sgd_nesterov", fused=True)
    if momentum > 0:
        # The fused kernel leaves the buffers of a first step that is held back uninitialised; zeros give the same step.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_scheduler(
    optimizer: Optimizer,
    name: str,
    epochs: int,
    *,
    first_epoch: int = 0,
    step_size: int = 30,
    gamma: float = 0.1,
    lr_min: float = 0.0,
    warmup_epochs: int = 0,
    warmup_method: str = "constant",
    warmup_decay: float = 0.01,
) -> LRScheduler:
    """A schedule stepped once an epoch, and already brought to `first_epoch` from the optimiser's initial rates.

    Since a schedule follows from its arguments alone, a resumed run builds it anew, and may do so for other `epochs`.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr", group["lr"])
    scheduler: LRScheduler
    if name == "steplr":
        scheduler = StepLR(optimizer, step_size=step_size, gamma=gamma)
    elif name == "cosineannealinglr":
        scheduler = CosineAnnealingLR(optimizer, T_max=max(1, epochs - warmup_epochs), eta_min=lr_min)
    else:
        scheduler = ExponentialLR(optimizer, gamma=gamma)
    if warmup_epochs > 0:
        if warmup_method == "linear":
            warmup: LRScheduler = LinearLR(optimizer, start_factor=warmup_decay, total_iters=warmup_epochs)
        else:
            warmup = ConstantLR(optimizer, factor=warmup_decay, total_iters=warmup_epochs)
        scheduler = SequentialLR(optimizer, [warmup, scheduler], milestones=[warmup_epochs])
    with warnings.catch_warnings():  # torch warns of a schedule stepped before the optimiser, which is meant here
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(first_epoch):
            scheduler.step()
    return scheduler


class GuardedUpdate:
    """Backward pass, clipping and step of one or more optimisers; a skipped step changes nothing.

    A step is skipped, for all networks together, where the caller holds it back (a loss is not finite), and, where
    gradients are measured anyway (by the fp16 scaler or for clipping), where one of them is not finite: such steps are
    counted (`skipped_steps`, on the device). Then the statistics that the forward passes have moved are restored too.
    Fused optimisers read the flag on the device; for rmsprop, which has no fused form, the host waits for it.
    """

    def __init__(
        self,
        optimizers: dict[str, Optimizer],
        device: torch.device,
        fp16: bool = False,
        clip_grad_norm: float | None = None,
        networks: Iterable[nn.Module] = (),
    ) -> None:
        """optimizers: by the name of the network that each updates; networks: those whose buffers are restored."""
        self.optimizers = optimizers
        self.clip_grad_norm = clip_grad_norm
        self.fp16 = fp16
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.measures_gradients = fp16 or clip_grad_norm is not None
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in (buffer for network in networks for buffer in network.buffers()):
            self.buffers.setdefault(buffer.dtype, []).append(buffer)
        self.buffers_before: dict[torch.dtype, Tensor] = {}

    def begin_step(self) -> None:
        """To be called before the forward passes of a step: remembers the buffers that these will move."""
        if self.measures_gradients:
            self.buffers_before = {dtype: _flat(buffers) for dtype, buffers in self.buffers.items()}

    def __call__(self, loss: Tensor, hold_back: Tensor) -> Tensor:
        """One update from a loss (); whether it was skipped, as a bool tensor () on the device, equal on all ranks.

        hold_back: bool tensor (), equal on all ranks.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        skipped = hold_back
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
        return skipped

    def _restore_buffers(self, skipped: Tensor) -> None:
        """Put the buffers back to what `begin_step` found where the step was skipped."""
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
        """Restore `state()`, keeping the learning rates that the rebuilt schedules have set.

        Raises UserError if it is of other optimisers or of other parameters.
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
        """For the log: the steps skipped since the run began; empty where gradients are not measured."""
        return {"skipped_steps": int(self.skipped_steps)} if self.measures_gradients else {}

    def raise_if_collapsed(self) -> None:
        """Raise UserError if the fp16 scale has collapsed: every step overflows, and nothing is learned any more."""
        if self.fp16 and self.scaler.get_scale() < SMALLEST_SCALE:
            raise UserError(
                "the fp16 gradient scale has fallen below 2^-14: every step overflows. Lower --lr or use bf16.",
                agreed=True,
            )


def _flat(tensors: list[Tensor]) -> Tensor:
    """A copy of tensors of one dtype, one after the other, (N,)."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _step(optimizer: Optimizer, skipped: Tensor) -> None:
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
        optimizer.step()
    elif not skipped.item():
        optimizer.step()


def _lay_out_as_parameters(optimizer: Optimizer) -> None:
    """Give restored buffers the memory format of their parameters, which the fused kernels take for granted."""
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if isinstance(buffer, Tensor) and buffer.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter).copy_(buffer)


class MovingAverage:
    """Exponential moving average of a model's weights and buffers (`--model-ema`), by timm's ModelEmaV3.

    Updated every `steps` steps; a plain copy during the learning rate's warm-up. As in torchvision's reference the
    decay is adjusted to mean the same at any batch size: 1 - min(1, (1 - decay) * global_batch * steps / epochs).
    That alone would keep about exp(-(1 - decay) * images) of the first weights over a whole run: nearly all, on a small
    set. So the decay also warms up, as timm has it: at most 1 - (1 + n)^(-2/3) at update n.
    """

    def __init__(
        self, model: nn.Module, decay: float, steps: int, *, epochs: int, global_batch: int, warmup_epochs: int = 0
    ) -> None:
        adjusted = 1 - min(1.0, (1 - decay) * global_batch * steps / epochs)
        self.source, self.steps, self.warmup_epochs = model, steps, warmup_epochs
        self.average = ModelEmaV3(model, decay=adjusted, use_warmup=True)
        self.updates = 0  # since the end of the learning rate's warm-up

    @property
    def model(self) -> nn.Module:
        return self.average.module

    def update(self, epoch: int, step: int, skipped: Tensor | None = None) -> None:
        """To be called after every step; takes the weights in at every `steps`-th, unless that step was skipped.

        skipped: a bool tensor (), for which the host waits then; None: it was not.
        """
        if step % self.steps == 0 and not (skipped is not None and skipped.item()):
            self.average.update(self.source, step=self.updates + 1)  # which it counts from 1
            self.updates = self.updates + 1 if epoch >= self.warmup_epochs else 0

    def memory(self, steps_per_epoch: int, epochs: int) -> tuple[float, float, int]:
        """How many steps the average reaches back: as the decay is set, at the run's end, and the steps of the run.

        Each epoch updates at its steps 0, `steps`, ...: once where it has fewer.
        """
        updates_per_epoch = -(-steps_per_epoch // self.steps)
        updates = updates_per_epoch * max(0, epochs - self.warmup_epochs)
        last = self.average.get_decay(max(1, updates))
        steps_between = steps_per_epoch / updates_per_epoch
        set_memory, last_memory = (steps_between / max(1 - decay, 1e-12) for decay in (self.average.decay, last))
        return set_memory, last_memory, steps_per_epoch * epochs

    def state(self) -> dict:
        return {"model_ema": self.model.state_dict(), "model_ema_updates": self.updates}

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model_ema"])
        self.updates = state["model_ema_updates"]
