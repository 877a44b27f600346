"""Everything that training changes, saved and restored together: the content of a checkpoint."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.checkpoints import verify
from utils.data.samplers import derive_seed
from utils.runtime import distributed, progress
from utils.runtime.progress import Position
from utils.training import models
from utils.training.meters import RunningMean
from utils.training.optim import MovingAverage
from utils.training.update import GuardedUpdate


class TrainingState(NamedTuple):
    """What a checkpoint saves. modules: networks and objective, by their names in the checkpoint.

    Schedules are not part of it: they follow from the arguments and the epoch.
    """

    modules: dict[str, nn.Module]
    update: GuardedUpdate
    meters: RunningMean

    @property
    def ema(self) -> MovingAverage | None:
        return self.update.ema

    def take(self) -> dict[str, Any]:
        """Plain values, and references to the tensors that training keeps changing. A collective."""
        return {
            "rng": rng_states(),
            "meters": self.meters.state(),
            **{name: module.state_dict() for name, module in self.modules.items()},
            **self.update.state(),
            **(self.ema.state() if self.ema else {}),
        }

    def first_not_finite(self) -> str | None:
        """The name of a weight or statistic that holds NaN or infinity; else None. Waits for the device."""
        networks = dict(self.modules)
        networks.pop("objective", None)  # its baseline starts as NaN
        if self.ema:
            networks["model_ema"] = self.ema.model
        for name, network in networks.items():
            values = {
                key: value
                for key, value in network.state_dict().items()
                if value.is_floating_point() and value.numel() > 0  # an empty one has no extremes
            }
            # The extremes are NaN if any value is; isfinite().all() takes several times as long.
            extremes = [torch.stack(value.aminmax()) for value in values.values()]
            finite = torch.stack(extremes).isfinite().all(1).tolist() if extremes else []
            bad = [key for key, is_finite in zip(values, finite, strict=True) if not is_finite]
            if bad:
                return f"{name}.{bad[0]}"
        return None

    def put_back(self, state: dict[str, Any], source: str) -> None:
        """Restore, in place, what `take` returned, except for random generators and learning rates.

        Raises UserError, naming the source, if the state belongs to other modules or optimisers.
        """
        for name, module in self.modules.items():
            models.load_strictly(module, state[name], f"{source}, '{name}'")
        optimizers = {
            name: verify.fitting_optimizer_state(source, name, optimizer, state["optimizers"].get(name))
            for name, optimizer in self.update.optimizers.items()
        }
        self.update.load_state({**state, "optimizers": optimizers}, source)
        if self.ema:
            models.load_strictly(self.ema.model, state["model_ema"], f"{source}, 'model_ema'")
            self.ema.load_state(state)
        self.meters.load_state(state["meters"])


def rng_states() -> list[dict[str, Tensor]]:
    """The states of the global generators, CPU and CUDA, of each rank. A collective."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return distributed.all_gather_object(state)


def restore_rng_state(states: list[dict[str, Tensor]]) -> None:
    """Restore this process's generators from what `rng_states` returned for its rank."""
    state = states[distributed.rank()]
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def restore_generators(state: dict[str, Any] | None, seed: int) -> None:
    """Give each rank its own random numbers: the checkpoint's, or a new stream from (seed, rank, position)."""
    kind = "GPU" if torch.cuda.is_initialized() else "CPU"
    if state is not None:
        saved_kind = "GPU" if all("cuda" in generators for generators in state["rng"]) else "CPU"
        if (len(state["rng"]), saved_kind) == (distributed.world_size(), kind):
            restore_rng_state(state["rng"])
            return
        progress.say(
            f"processes: {len(state['rng'])} ({saved_kind}) before, now {distributed.world_size()} ({kind}). "
            "The run continues from the same weights and the same position in the data, but with other global batches "
            "and masks, so not bit for bit."
        )
    start = Position.of(state)
    torch.manual_seed(derive_seed("process", seed, distributed.rank(), start.epoch, start.step))
