"""The training losses of a checkout, for a change that claims to leave float32 alone: are they equal before and after?

    python benchmarks/losses.py ROOT _policy_gradient before.json --data-path DATA --lr 1e-6 ...   # in each checkout
    python benchmarks/losses.py before.json after.json

Each is a process of its own, since it imports the scripts from ROOT. Masks are of equal uniform draws on both sides, in
whatever order each side samples.
"""

import importlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


def record(root: str, script: str, output: str, flags: list[str]) -> None:
    """Write the loss of each step of one epoch, without the rehearsal's."""
    sys.path[0] = root
    import torch

    from _policy_gradient import policy
    from utils.training.meters import RunningMean

    losses: list[float] = []
    update = RunningMean.update

    def listen(meters: RunningMean, **values: torch.Tensor) -> None:
        losses.append(values["train_loss"].item())
        update(meters, **values)

    def log_odds_of_uniform_cells(concentrations: torch.Tensor) -> torch.Tensor:
        return torch.logit(0.01 + 0.98 * torch.rand(concentrations.shape[1:]))  # concentrations: (2, B, G*G)

    torch.set_num_threads(1)
    RunningMean.update, policy._sample_log_odds = listen, log_odds_of_uniform_cells
    with TemporaryDirectory() as folder:
        importlib.import_module(f"{script}.train").main([*flags, "--epochs", "1", "--output-dir", folder])
    Path(output).write_text(json.dumps(losses[1:]))


def compare(one: str, other: str) -> float:
    """Greatest relative difference over the first 50 steps."""
    pairs = zip(*(json.loads(Path(path).read_text())[:50] for path in (one, other)), strict=True)
    return max(abs(before - after) / abs(before) for before, after in pairs)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(f"greatest relative difference of the first 50 losses: {compare(*sys.argv[1:]):.1e}")
    else:
        record(*sys.argv[1:4], sys.argv[4:])
