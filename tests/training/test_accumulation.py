"""--grad-accum-steps: N parts of a batch give the gradients of the whole batch, on any number of processes."""

import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from _policy_gradient import policy
from _policy_gradient import train as policy_gradient
from _policy_gradient.masking import build_masking, build_objective, build_policy
from tests.conftest import SMALL, SMALL_POLICY
from tests.helpers.parsing import parse
from tests.helpers.ranks import call_warm, run_ranks
from tests.helpers.runs import SCRIPTS, assert_same, assert_same_run, state_of, status_of
from utils.data import splits
from utils.results.log import read_log
from utils.runtime import distributed, node_limits
from utils.runtime.errors import UserError
from utils.runtime.signals import Interrupted
from utils.training import accumulation
from utils.training.accumulation import InMicroBatches
from utils.training.run import use_cache_and_compile
from utils.training.update import GuardedUpdate

# Without BatchNorm: `test_vit` has LayerNorm only.
VIT = ["--model", "test_vit", "--lr", "0.01", "--epochs", "1", "--label-smoothing", "0.1"]
WEIGHTED = ["--mixup-alpha", "0.2", "--class-weights", "sqrt", "--model-ema", "--clip-grad-norm", "1"]
LOO = ["--objective", "reinforce", "--baseline", "loo", "--masks-per-image", "2", "--entropy-weight", "0.1"]
CASES = [
    ("_normal", WEIGHTED),
    ("_policy_gradient", ["--objective", "published"]),
    ("_policy_gradient", ["--objective", "published-unscaled", "--policy-sign", "adversarial"]),
    ("_policy_gradient", ["--objective", "reinforce", "--policy-lr", "0.1"]),
    ("_policy_gradient", [*LOO, "--class-weights", "balanced"]),
    ("_policy_gradient", ["--objective", "reinforce", "--mask-policy", "prior"]),
    ("_policy_gradient", ["--objective", "pathwise", "--policy-lr", "0.1", "--keep-mean", "--class-weights", "sqrt"]),
]


@pytest.fixture
def uneven(image_folder, tmp_path):
    """The tiny set with 12, 9 and 6 training images of its classes, 27 in all."""
    lines = [f"train/dark/{number}.png" for number in range(3)] + [f"train/striped/{n}.png" for n in range(6)]
    (tmp_path / "exclude.txt").write_text("\n".join(lines))
    return ["--data-path", str(image_folder), "--exclude", str(tmp_path / "exclude.txt")]


@pytest.fixture
def heads_without_batch_norm(monkeypatch):
    head = policy._head

    def plain_head(features, cells):
        return nn.Sequential(*(layer for layer in head(features, cells) if not isinstance(layer, nn.BatchNorm1d)))

    monkeypatch.setattr(policy, "_head", plain_head)


def assert_close_runs(one, other):
    """Equal weights, priors, averages, positions and logs within the rounding of float32."""
    states = [state_of(folder) for folder in (one, other)]
    for name in ("model", "policy_net", "model_ema"):
        for key, value in states[0].get(name, {}).items():
            torch.testing.assert_close(states[1][name][key], value, rtol=1e-4, atol=2e-6, msg=f"{name}.{key}")
    assert [states[1][name] for name in ("epoch", "step", "images")] == [1, 0, 0]
    for line, same in zip(*map(read_log, (one, other)), strict=True):
        assert line.keys() == same.keys()
        line.pop("images_per_second")
        assert {name: same[name] for name in line} == pytest.approx(line, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), CASES)
def test_parts_equal_one_large_batch(name, flags, uneven, tmp_path, heads_without_batch_norm):
    script, small = SCRIPTS[name]
    if name == "_policy_gradient":
        flags = [*flags, "--policy-model", "test_vit"]
    for folder, size in (("whole", ["12"]), ("parts", ["4", "--grad-accum-steps", "3"])):
        script.main([*small, *VIT, *flags, *uneven, "--output-dir", str(tmp_path / folder), "--batch-size", *size])
    assert_close_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_in_parts(name, uneven, tmp_path):
    """Against two processes with whole batches, which draw the same masks; _normal also against a single process."""
    script, small = SCRIPTS[name]
    command = [*small, *VIT, *uneven]
    if name == "_policy_gradient":
        command += ["--policy-model", "test_vit", "--mask-policy", "prior"]
    else:
        script.main([*command, "--output-dir", str(tmp_path / "single"), "--batch-size", "12"])
    for folder, size in (("whole", [6]), ("parts", [2, "--grad-accum-steps", 3])):
        run_ranks(f"{name}/train.py", *command, "--output-dir", tmp_path / folder, "--batch-size", *size, processes=2)
    for folder in {"_normal": ("whole", "single")}.get(name, ("whole",)):
        assert_close_runs(tmp_path / folder, tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_resumed_from_a_signal_within_an_accumulation(name, image_folder, tmp_path, monkeypatch, capsys):
    """The signal comes between two parts; the run stops after the whole update, and continues bit for bit."""
    script, small = SCRIPTS[name]
    flags = ["--batch-size", "4", "--grad-accum-steps", "3", "--model-ema", "--model-ema-steps", "2", "--epochs", "2"]
    command = [*small, *flags, "--data-path", str(image_folder), "--output-dir"]
    script.main([*command, str(tmp_path / "whole")])
    assert "global batch: 1 process x 4 x 3 micro-batches = 12 images; 3 steps an epoch" in capsys.readouterr().out
    accumulate, calls = GuardedUpdate.accumulate, []

    def signal_between_parts(update, loss):
        accumulate(update, loss)
        calls.append(loss)
        if len(calls) == 3 + 3 + 1:  # after the rehearsal and step 0, the first part of step 1
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(GuardedUpdate, "accumulate", signal_between_parts)
    with pytest.raises(Interrupted, match="SIGTERM: stopped after 2 steps of epoch 0"):
        script.main([*command, str(tmp_path / "part")])
    assert len(calls) == 3 + 2 * 3
    state = state_of(tmp_path / "part")
    assert (state["epoch"], state["step"], state["images"]) == (0, 2, 24)
    script.main([*command, str(tmp_path / "part"), "--resume", "auto"])
    assert status_of(tmp_path / "part")["status"] == "finished"
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_a_network_in_parts_has_the_gradients_and_statistics_of_its_parts():
    """BatchNorm normalises each part; its running statistics move once for each, though each is computed twice."""
    torch.manual_seed(0)
    images = torch.randn(12, 3, 8, 8)
    plain, in_parts = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout()) for _ in "ab")
    in_parts.load_state_dict(plain.state_dict())
    results = []
    for network, run in (
        (plain, lambda images: tuple(torch.cat([plain(part) for part in images.split(4)]).split(72, dim=1))),
        (in_parts, InMicroBatches(Halves(in_parts), 3)),
    ):
        torch.manual_seed(1)
        first, second = run(images)  # (12, 72) each
        (first.square().mean() + second.mean()).backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        results.append([first.detach(), second.detach(), *gradients, *network.buffers()])
    assert results[0][-1] == 3  # batches that BatchNorm has counted
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)
    assert_same(results[0][:2] + results[0][-3:], results[1][:2] + results[1][-3:])


class Halves(nn.Module):
    """A network's outputs (B, 2F) as two tensors (B, F)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images).chunk(2, dim=1)


class Largest(nn.Module):
    """Records how many images pass at once."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        return images.mean((2, 3))


def reductions(parts: int, store: str) -> tuple[int, list[float]]:
    """How often DistributedDataParallel averages a step's gradients over the processes, and the gradient."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    torch.manual_seed(0)
    network = distributed.wrap(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.device("cpu"))
    calls = []

    def count(_, bucket):
        calls.append(bucket)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    network.register_comm_hook(None, count)
    update = GuardedUpdate({"classifier": torch.optim.SGD(network.parameters(), lr=0.0)}, torch.device("cpu"))
    update.begin_step()
    images, targets = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 1, 0, 1, 1])
    outputs = accumulation.classify(network, images, targets, update, Plain(parts))
    update(outputs.losses.mean(), torch.tensor(False))
    return len(calls), network.module[1].weight.grad.flatten().tolist()


class Plain:
    label_smoothing, class_weights = 0.0, None

    def __init__(self, micro_batches):
        self.micro_batches = micro_batches

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.slow
def test_processes_average_once_for_each_update(tmp_path):
    (whole, gradient), (parts, same) = (call_warm(reductions, n, str(tmp_path / str(n))) for n in (1, 3))
    assert (whole, parts) == (1, 1)
    assert same == pytest.approx(gradient, rel=1e-5, abs=1e-8)


def test_a_part_of_the_batch_passes_at_once():
    network, update = Largest(), GuardedUpdate({}, torch.device("cpu"))
    images = torch.rand(6, 3, 4, 4, requires_grad=True)
    outputs = accumulation.classify(network, images, torch.tensor([0, 1, 2, 0, 1, 2]), update, Plain(3))
    assert network.sizes == [2, 2, 2]
    assert [tuple(value.shape) for value in outputs] == [(6, 3), (6,), (6,)]
    assert images.grad[:4].abs().sum() > 0  # done
    assert images.grad[4:].abs().sum() == 0  # the caller's
    outputs.losses.mean().backward()
    whole = images.detach().requires_grad_()
    nn.functional.cross_entropy(whole.mean((2, 3)), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    torch.testing.assert_close(images.grad, whole.grad)


def test_a_part_of_the_batch_passes_through_the_policy_at_once():
    args = parse("_policy_gradient", *SMALL_POLICY, "--grad-accum-steps", 3)
    network, sizes = build_policy(args, None, None, torch.device("cpu")), []
    masking = build_masking(args, network, build_objective(args), torch.device("cpu"))
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    heads = masking.policy(torch.rand(12, 3, 32, 32))
    assert [tuple(head.shape) for head in heads] == [(12, 64), (12, 64)]
    assert sizes == [4, 4, 4]
    heads[0].sum().backward()
    assert sizes == [4] * 6  # computed again


def test_masks_that_are_not_learned_need_no_gradient_through_all_parts(image_folder, tmp_path, monkeypatch):
    """With `pathwise` the classifier would otherwise be computed twice for nothing."""
    monkeypatch.setattr(policy_gradient, "InMicroBatches", None)
    flags = ["--mask-policy", "uniform", "--objective", "pathwise", "--grad-accum-steps", "2", "--epochs", "1"]
    policy_gradient.main([*SMALL_POLICY, *flags, "--data-path", str(image_folder), "--output-dir", str(tmp_path)])
    assert status_of(tmp_path)["status"] == "finished"


def test_the_reward_is_not_weighted_in_any_part():
    """Each image's cross-entropy without weights, and its loss with the weight of its class: 2, 1 and 3."""
    update, settings = GuardedUpdate({}, torch.device("cpu")), Plain(2)
    settings.class_weights, settings.label_smoothing = torch.tensor([2.0, 1, 3]), 0.3
    images, targets = torch.rand(4, 3, 4, 4, requires_grad=True), torch.tensor([0, 2, 1, 0])
    _, reward, losses = accumulation.classify(Largest(), images, targets, update, settings)
    logits = images.detach().mean((2, 3))
    for values, weight in ((reward, None), (losses, settings.class_weights)):
        expected = nn.functional.cross_entropy(logits, targets, weight, reduction="none", label_smoothing=0.3)
        assert values.tolist() == pytest.approx(expected.tolist())


def test_only_one_part_a_step_uses_cuda_graphs(monkeypatch):
    """A graph would overwrite the outputs of the previous part, which are still needed."""
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, mode: modes.append(mode))
    for parts in (1, 2):
        args = parse("_normal", "--compile", "--grad-accum-steps", parts)
        use_cache_and_compile(SimpleNamespace(args=args, splits=None, device=torch.device("cuda")), [nn.Linear(1, 1)])
    assert modes == ["reduce-overhead", None]


def test_shared_memory_must_hold_whole_batches(image_folder, monkeypatch):
    """The workers pass on batches of all parts: here 2 of 24 images of 3 x 32 x 32 bytes."""
    monkeypatch.setattr(node_limits, "free_shared_memory", lambda: 100_000)
    flags = [*SMALL, "--data-path", image_folder, "--workers", 1, "--grad-accum-steps"]
    for parts in (1, 3):
        args = parse("_normal", *flags, parts)
        training = splits.open_splits(args).training
        with pytest.raises(UserError, match=r"2 batches of 0\.1 MB") if parts == 3 else nullcontext():
            splits.training_loader(args, training, torch.device("cpu"))
