"""The choice of learning rates: means by hand, missing and diverged runs, and the command."""

import math
from pathlib import Path

import pytest

from experiments import choose_rates
from experiments.plan import Arm, Plan, Stage
from tests.helpers.finished_runs import finish, write_stage
from utils.runtime.errors import UserError

STAGES = (Stage("pretraining", "_normal", "--epochs 2"), Stage("fine-tuning", "_normal", "--epochs 2"))
RATES = ("0.02", "0.05", "0.125")
ARMS = tuple(Arm(f"{name}-{rate}", STAGES, 3) for name in ("none", "uniform-4") for rate in RATES)
PLAN = Plan("tuning", "", ARMS, "none-0.05")


def write_losses(results: Path, arm: str, losses: list[float | None]) -> None:
    """Finished runs of seeds 0, 1, ... with these losses on val at the end."""
    for seed, loss in enumerate(losses):
        for stage in ("pretraining", "fine-tuning"):
            write_stage(results / arm / f"seed{seed}" / stage, [{"val_loss": 0.1}, {"val_loss": loss}])
        finish(results, arm, seed)


def test_the_rate_with_the_lowest_mean_loss_is_chosen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(choose_rates, "PLAN", PLAN)
    write_losses(tmp_path, "none-0.02", [1.1, 1.3, 1.0])
    write_losses(tmp_path, "none-0.05", [1.0, 1.1, 0.9])
    write_losses(tmp_path, "none-0.125", [0.9, None, 0.9])  # one diverged
    write_losses(tmp_path, "uniform-4-0.02", [2.0, 3.0])
    write_losses(tmp_path, "uniform-4-0.05", [1.9])
    losses = choose_rates.final_losses(PLAN, tmp_path)
    assert losses["none"] == {0.02: [1.1, 1.3, 1.0], 0.05: [1.0, 1.1, 0.9], 0.125: [0.9, math.inf, 0.9]}
    choose_rates.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "| none | 1.133 ± 0.153 | 1.000 ± 0.100 | inf | 0.05 |  |" in lines
    assert (
        "| uniform-4 | 2.500 ± 0.707 (2) | 1.900 (1) | \N{EN DASH} | 0.02 | incomplete: 6 of 9 runs missing |" in lines
    )
    assert lines[-1] == "CHOSEN = {'none': 0.05, 'uniform-4': 0.02}"


def test_a_lower_rate_within_one_standard_error_is_chosen():
    """Paired differences of 0, .4 and -.1: mean .1, standard error .153; of .1, .2, .1: .133 and .033."""
    best = [1.0, 1.1, 0.9]
    assert choose_rates.choose({0.02: [1.0, 1.5, 0.8], 0.05: best, 0.125: best}) == 0.02
    assert choose_rates.choose({0.02: [1.1, 1.3, 1.0], 0.05: best}) == 0.05
    assert choose_rates.choose({0.05: best, 0.125: [1.0, 1.5, 0.8]}) == 0.05  # never a higher one
    assert choose_rates.choose({0.02: [1.0], 0.05: [0.9]}) == 0.05


def test_a_choice_at_the_edge_is_marked():
    losses = {"none": {0.02: [1.0], 0.05: [2.0]}}
    assert choose_rates.table(losses, 1).endswith("| 0.02 | at the edge of the rates tried |")


def test_results_without_finished_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run of the plan 'small_tuning' has finished"):
        choose_rates.main([str(tmp_path)])
