"""Parameter groups, optimisers, schedules, and the moving average of the weights."""

import warnings

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

from utils.choices import EMBEDDINGS


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
    transformer_embedding_decay: float | None = None,
) -> list[dict]:
    """Parameter groups of the trainable parameters, by weight decay; None: `weight_decay`.

    The order of precedence is that of torchvision's reference: embeddings by name, biases, normalisation layers.
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
    """Whether this is BatchNorm2d, LayerNorm, GroupNorm, timm's RmsNorm and so on: they share no base class."""
    return "norm" in type(module).__name__.lower()


def build_optimizer(name: str, groups: list[dict], lr: float, momentum: float) -> Optimizer:
    """sgd, sgd_nesterov, rmsprop (eps .0316, alpha .9, as in torchvision's reference) or adamw; fused if possible."""
    if name == "adamw":
        return AdamW(groups, lr=lr, fused=True)
    if name == "rmsprop":
        return RMSprop(groups, lr=lr, momentum=momentum, eps=0.0316, alpha=0.9)
    optimizer = SGD(groups, lr=lr, momentum=momentum, nesterov=name == "sgd_nesterov", fused=True)
    if momentum > 0:
        # If the first step is skipped, the fused kernel leaves its buffers uninitialised. Zeros give the same step.
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
    """A schedule that is stepped once per epoch, advanced to `first_epoch` from the optimiser's initial rates.

    A schedule follows from its arguments alone, so a resumed run rebuilds it, possibly for other `epochs`.
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
    with warnings.catch_warnings():  # torch warns of stepping a schedule before the optimiser, which is intended
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(first_epoch):
            scheduler.step()
    return scheduler


class MovingAverage:
    """Exponential moving average of a model's weights and buffers (`--model-ema`), by timm's ModelEmaV3.

    Updated every `steps` steps; a plain copy during the learning rate's warm-up. As in torchvision's reference the
    decay is adjusted for the batch size: 1 - min(1, (1 - decay) * global_batch * steps / epochs). Alone, that would
    keep about exp(-(1 - decay) * images) of the initial weights over a whole run, which is nearly all on a small set.
    So the decay also warms up, as in timm: it is at most 1 - (1 + n)^(-2/3) at update n.
    """

    def __init__(
        self, model: nn.Module, decay: float, steps: int, *, epochs: int, global_batch: int, warmup_epochs: int = 0
    ) -> None:
        adjusted = 1 - min(1.0, (1 - decay) * global_batch * steps / epochs)
        self.source, self.steps, self.warmup_epochs = model, steps, warmup_epochs
        self.average = ModelEmaV3(model, decay=adjusted, use_warmup=True)
        self.updates = 0  # since the learning rate's warm-up ended

    @property
    def model(self) -> nn.Module:
        return self.average.module

    def update(self, epoch: int, step: int, skipped: Tensor | None = None) -> None:
        """Update at every `steps`-th step, unless that step was skipped. To be called after each step.

        skipped: bool tensor (), for which the host waits at those steps; None: not skipped.
        """
        if step % self.steps == 0 and not (skipped is not None and skipped.item()):
            self.average.update(self.source, step=self.updates + 1)  # timm counts updates from 1
            self.updates = self.updates + 1 if epoch >= self.warmup_epochs else 0

    def memory(self, steps_per_epoch: int, epochs: int) -> tuple[float, float, int]:
        """The average's memory in steps: for the decay as set, at the end of the run; and the steps of the run.

        Each epoch updates at its steps 0, `steps`, 2 * `steps`, ..., so at least once.
        """
        updates_per_epoch = -(-steps_per_epoch // self.steps)
        updates = updates_per_epoch * max(0, epochs - self.warmup_epochs)
        last = self.average.get_decay(max(1, updates))
        steps_between = steps_per_epoch / updates_per_epoch
        set_memory, last_memory = (steps_between / max(1 - decay, 1e-12) for decay in (self.average.decay, last))
        return set_memory, last_memory, steps_per_epoch * epochs

    def warning(self, steps_per_epoch: int, epochs: int) -> str:
        """A sentence if the decay as set would reach back further than the whole run; otherwise ""."""
        set_memory, last_memory, steps = self.memory(steps_per_epoch, epochs)
        if set_memory <= steps:
            return ""
        return (
            f"--model-ema: at this decay the average would reach back {set_memory:,.0f} steps, and the run has "
            f"{steps:,}; its warm-up makes it {last_memory:,.0f} at the end. A smaller --model-ema-decay or "
            "--model-ema-steps shortens it."
        )

    def state(self) -> dict:
        return {"model_ema": self.model.state_dict(), "model_ema_updates": self.updates}

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model_ema"])
        self.updates = state["model_ema_updates"]
