"""A small network with fixed batches, and guarded updates of it."""

import torch
from torch import nn

from utils.training.optim import build_optimizer, build_scheduler, parameter_groups
from utils.training.update import GuardedUpdate

CPU = torch.device("cpu")
MOMENTUM = 0.9
STEP = {"step_size": 3, "gamma": 0.1}  # of the schedule steplr


def small_network(seed: int = 0) -> nn.Sequential:
    """No bias before BatchNorm: its gradient would be rounding noise, which AdamW makes large."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def batch_loss(network: nn.Module, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    inputs, targets = torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)
    return nn.functional.cross_entropy(network(inputs), targets)


def decayed_groups(network: nn.Module) -> list[dict]:
    return parameter_groups(network, 0.05, norm_weight_decay=0.0)


def guarded_update(
    network: nn.Module, name: str, lr: float = 0.05, first_epoch: int | None = None, **settings
) -> GuardedUpdate:
    """An update of the network. first_epoch: of a steplr schedule; None: no schedule."""
    optimizer = build_optimizer(name, decayed_groups(network), lr, MOMENTUM)
    if first_epoch is not None:
        build_scheduler(optimizer, "steplr", 9, first_epoch=first_epoch, **STEP)
    return GuardedUpdate({"classifier": optimizer}, CPU, **settings)


def plain_update(*parameters: nn.Parameter, momentum: float = 0.0, **settings) -> GuardedUpdate:
    """An update of each parameter as a network of its own, by SGD with a learning rate of 1."""
    optimizers = {
        str(number): build_optimizer("sgd", [{"params": [parameter]}], 1.0, momentum)
        for number, parameter in enumerate(parameters)
    }
    return GuardedUpdate(optimizers, CPU, **settings)


def optimizer_tensors(update: GuardedUpdate) -> dict[tuple, torch.Tensor]:
    """Copies of the parameters and the optimisers' buffers, by (optimiser, number of the parameter, name)."""
    tensors = {}
    for name, optimizer in update.optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            tensors[name, number, "parameter"] = parameter.detach().clone()
            for key, value in optimizer.state[parameter].items():
                tensors[name, number, key] = value.clone() if torch.is_tensor(value) else torch.tensor(value)
    return tensors
