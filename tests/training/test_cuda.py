"""What only a GPU can show; `python -m pytest tests/training/test_cuda.py` on a machine that has one."""

import signal
from functools import partial

import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from _policy_gradient.mask import SmoothMask
from _policy_gradient.masking import draw_masks
from _policy_gradient.policy import create_policy
from tests.conftest import SMALL, SMALL_POLICY, run_script
from tests.helpers.runs import assert_same_run
from utils.results.log import read_log
from utils.runtime.signals import Interrupted, StopRequest
from utils.training.update import LAG, StepGuard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
SCRIPTS = {
    "_normal": (normal, [*SMALL, "--device", "cuda"]),
    "_policy_gradient": (policy_gradient, [*SMALL_POLICY, "--device", "cuda"]),
}
EXACT = ["--use-deterministic-algorithms", "--lr", "0.01", "--epochs", "2"]


def test_a_stop_is_read_two_steps_after_it_was_asked_for_and_nothing_waits():
    device = torch.device("cuda")
    with StopRequest() as stop:
        guard, read = StepGuard(device, str, stop), []
        torch.cuda.set_sync_debug_mode("error")  # an exception at any wait of the host for the device
        try:
            for step in range(LAG + 3):
                if step == 1:
                    signal.raise_signal(signal.SIGTERM)
                guard.exchange(torch.ones((), device=device), step, torch.tensor([0]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        read = [guard.stop_agreed() for _ in range(3)]
    assert read == [False, True, True]


@pytest.mark.parametrize("flags", [[], ["--amp"], ["--amp", "--amp-dtype", "fp16"], ["--opt", "adamw", "--model-ema"]])
@pytest.mark.parametrize("name", SCRIPTS)
def test_resumed_equals_uninterrupted_bit_for_bit(name, flags, image_folder, tmp_path, monkeypatch):
    script, small = SCRIPTS[name]
    command = [*small, *EXACT, *flags, "--data-path", str(image_folder), "--output-dir"]
    script.main([*command, str(tmp_path / "whole")])
    exchange = StepGuard.exchange

    def stop_at_step_1(guard, loss, step, *rest):
        if step == 1 and guard.stop.previous_handlers:
            signal.raise_signal(signal.SIGTERM)
        return exchange(guard, loss, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(StepGuard, "exchange", stop_at_step_1)
        with pytest.raises(Interrupted, match="stopped after 4 steps of epoch 0"):
            script.main([*command, str(tmp_path / "part"), "--resume", "auto"])
    script.main([*command, str(tmp_path / "part"), "--resume", "auto", "--workers", "1"])
    assert_same_run(tmp_path / "whole", tmp_path / "part")


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_rank_of_nccl_has_the_losses_of_a_single_process(name, image_folder, tmp_path):
    script, small = SCRIPTS[name]
    flags = [*small, *EXACT, "--data-path", str(image_folder), "--output-dir"]
    script.main([*flags, str(tmp_path / "alone")])
    run_script(f"{name}/train.py", *flags, tmp_path / "nccl", processes=1)
    for one, other in zip(read_log(tmp_path / "alone"), read_log(tmp_path / "nccl"), strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert other["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_cuda_and_cpu_see_the_same_first_loss(name, image_folder, tmp_path):
    """Of the same weights and images, where nothing random depends on the device."""
    script, small = SCRIPTS[name]
    more = ["--objective", "reinforce", "--mask-policy", "none"] if name == "_policy_gradient" else []
    losses = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        flags = [*small, *more, "--lr", "1e-6", "--epochs", "1", "--device", device]
        script.main([*flags, "--data-path", str(image_folder), "--output-dir", str(folder)])
        losses.append(read_log(folder)[0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_compiled_and_plain_have_close_losses(name, image_folder, tmp_path):
    script, small = SCRIPTS[name]
    losses = []
    for flags in ([], ["--compile"]):
        folder = tmp_path / f"run{len(flags)}"
        more = [*EXACT, "--lr", "1e-4", *flags, "--data-path", str(image_folder), "--output-dir", str(folder)]
        script.main([*small, *more])
        losses.append(read_log(folder)[0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_masks_replayed_as_a_cuda_graph_are_the_same_bit_for_bit():
    """Cells, densities, gradients and the generator's state, over several replays, while the masks fade."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    policy = create_policy("learned", "test_resnet", 16, 64).to(device)
    weight = torch.ones((), device=device)
    mask = SmoothMask(64, 16, 5, 2.0, 0.5, 1.5).to(device)
    plain = partial(draw_masks, policy, mask, masks_per_image=2, mask_weight=weight)
    images = torch.rand(4, 3, 64, 64, device=device)
    heads = [torch.randn(4, 256, device=device, requires_grad=True) for _ in range(2)]
    found = []
    for draw in (plain, torch.compile(plain, backend="cudagraphs")):
        torch.cuda.manual_seed(0)
        for replay in range(4):
            weight.fill_(1 - replay / 4)
            masked = draw(*heads, images)
            loss = masked.action.log_prob.logsumexp(1).mean() + masked.action.entropy.mean()
            gradients = torch.autograd.grad(loss, heads)
            found.append(
                [tensor.detach().clone() for tensor in (masked.images, masked.masks, *masked.action, *gradients)]
            )
        found[-1].append(torch.cuda.get_rng_state())
    for one, other in zip(found[:4], found[4:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert not torch.equal(found[0][0], found[1][0])
