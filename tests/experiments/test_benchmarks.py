"""The benchmarks: rows, tables, the published step, training curves. No test depends on how long anything takes."""

import gc
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from _policy_gradient import train as policy_gradient
from _policy_gradient.mask import SmoothMask
from _policy_gradient.objective import published_loss
from benchmarks import curves, memory, profiles, published, run
from benchmarks.ours import FixedLoader, build, network_input
from benchmarks.report import Measurement, Target
from benchmarks.setting import QUICK_POLICY, Setting
from benchmarks.steps import published_step_of
from benchmarks.timing import compare, interleaved
from tests.conftest import SMALL_POLICY

FIELDS = {"number", "what", "ours", "theirs", "units", "ratio", "spread", "target", "met", "repeats", "note"}
FIELDS |= {"hardware", "versions", "commit", "command", "date"}


@pytest.fixture(autouse=True)
def fast_garbage_collection():
    """The timing collects garbage before each side; without the objects of other tests this takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
def test_one_command_measures_all_rows_and_writes_its_tables(tmp_path, capsys):
    assert run.main(["--device", "cpu", "--quick", "--repeats", "1", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results_cpu.json").read_text())
    assert {row["number"] for row in rows} == set(run.ROWS) == set(range(1, 12))
    for row in rows:
        assert row.keys() == FIELDS
        assert row["repeats"] >= 1 and row["ratio"] is not None and len(row["spread"]) == 2
        assert row["hardware"]["cpu"] and row["hardware"]["cores"] >= 1
        assert row["versions"]["torch"] == torch.__version__.split("+")[0]
        assert row["command"].startswith("python -m benchmarks.run --device cpu --quick")
    assert capsys.readouterr().out == (tmp_path / "results_cpu.txt").read_text()
    assert (tmp_path / "results_cpu.md").read_text().startswith("| # | what | ours |")


def test_sides_are_timed_in_turns_and_warmups_are_discarded():
    order, waits = [], []
    seconds = iter([0, 100, 0, 100, 0, 3, 10, 14, 20, 25, 30, 38])  # two readings per side, the first round a warm-up
    times = interleaved(
        {"ours": lambda: order.append("ours"), "theirs": lambda: order.append("theirs")},
        repeats=2,
        warmups=1,
        synchronize=lambda: waits.append(len(order)),
        clock=lambda: float(next(seconds)),
    )
    assert order == ["ours", "theirs"] * 3
    assert waits == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]  # before and after each piece of work
    assert times == {"ours": [3.0, 5.0], "theirs": [4.0, 8.0]}


def test_the_ratio_is_the_median_and_its_target_a_minimum_or_a_maximum():
    comparison = compare([10.0, 30.0, 80.0], [10.0, 20.0, 40.0])
    assert comparison == (30.0, 20.0, 1.5, 1.0, 2.0, 3)
    assert Target(True, 1.2).is_met(1.2) and not Target(True, 1.2).is_met(1.1)
    assert Target(False, 1.0).is_met(1.0) and not Target(False, 1.0).is_met(1.1)


def test_a_failing_row_is_reported_and_the_others_run(tmp_path, monkeypatch, capsys):
    def broken(setting: Setting) -> list[Measurement]:
        """Row 2: broken."""
        raise ValueError("out of order")

    monkeypatch.setitem(run.ROWS, 2, broken)
    assert run.main(["--device", "cpu", "--quick", "--rows", "2", "1", "--output", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "results_cpu.json").read_text())
    assert [row["number"] for row in rows] == [2, 1]
    assert rows[0]["ratio"] is None and "out of order" in rows[0]["note"]
    assert "not measured yet" in capsys.readouterr().out


def test_the_published_step_has_our_first_loss_for_equal_cells(image_folder, tmp_path, monkeypatch):
    loop = build(policy_gradient, image_folder, tmp_path / "run", *SMALL_POLICY)
    setting = Setting(torch.device("cpu"), True, None, tmp_path, repeats=1)
    theirs = published_step_of(setting, loop)
    loader = FixedLoader(loop, steps=1)
    images, targets = network_input(loop, loader)
    cells = torch.rand(len(images), QUICK_POLICY["grid"] ** 2).clamp(0.01, 0.99)  # (B, G*G)
    monkeypatch.setattr("_policy_gradient.policy._sample_log_odds", lambda *_: cells.logit())
    monkeypatch.setattr(published.Beta, "sample", lambda distribution: cells)
    ours = loop.train_epoch(loader)
    assert not [*(tmp_path / "run").glob("*.pth"), *(tmp_path / "run").glob("*.lock")]  # nothing is saved
    loss, top1, top5 = theirs(images, targets)
    assert ours["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert ours["train_top1"] == pytest.approx(top1) and top5 == 1  # there are three classes
    for our_weights, their_weights in zip(loop.classifier.parameters(), theirs.classifier.parameters(), strict=True):
        torch.testing.assert_close(our_weights, their_weights, rtol=1e-4, atol=1e-5)


def test_the_published_mask_and_objective_equal_ours():
    generator = torch.Generator().manual_seed(0)
    cells, log_prob = torch.rand(3, 64, generator=generator), torch.randn(3, 64, generator=generator)
    cross_entropy = F.cross_entropy(torch.randn(3, 5, generator=generator), torch.tensor([0, 3, 4]), reduction="none")
    mask = published.published_mask(cells, 32, **QUICK_POLICY)
    torch.testing.assert_close(SmoothMask(32, **QUICK_POLICY)(cells), mask, rtol=0, atol=1e-5)
    loss = published.published_objective(log_prob, cross_entropy.mean())
    torch.testing.assert_close(published_loss(cross_entropy, log_prob), loss)


def test_curves_are_read_from_the_real_loop_and_repeat(image_folder, tmp_path):
    def losses_of(folder: str, *flags: object) -> list[float]:
        command = [*SMALL_POLICY, *flags]
        return curves.training_losses(policy_gradient, image_folder, tmp_path / folder, 6, command)

    first = losses_of("first")  # 4 steps an epoch
    assert len(first) == 6 and first == losses_of("again") and first != losses_of("other", "--seed", 1)


def test_windows_and_overlaps_of_curves():
    assert curves.window_means([9, 1, 3, 5, 7], windows=2) == [2, 6]
    plain = [[1.0, 1.0], [2.0, 2.0]]
    near, far = curves.overlaps([[1.5, 3.0], [2.5, 2.5]], plain)
    assert near == (2.0, 1.5, 2.5, True) and far == (2.75, 2.5, 3.0, False)


def test_shares_of_a_profile_by_kind_and_by_name():
    seconds = Counter({"mkldnn_convolution": 4.0, "convolution_backward": 2.0, "native_batch_norm": 1.0, "mul": 3.0})
    lines = ["10 s", " 60.0%  convolution", " 10.0%  BatchNorm", " 30.0%  mul"]
    assert profiles.shares(seconds, 0.0).splitlines() == lines
    assert profiles.idle_share([(0, 2), (1, 3), (1.5, 2), (6, 10)]) == pytest.approx(0.3)  # nothing from 3 to 6


def test_both_ways_to_hold_file_names_read_the_same():
    ours, theirs = memory.arrays(1_000), memory.objects(1_000)
    for index in (0, 7, 999):
        path, target, _ = ours(index)
        assert (f"/data/radimagenet/train/{path}", target) == theirs(index)
    assert theirs(999) == ("/data/radimagenet/train/finding-164/ct0000999.png", 164)
