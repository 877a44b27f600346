"""What a run prints at its start: the facts by which a user sees that it is the run that was meant."""

import argparse
import math
from types import SimpleNamespace

import pytest
import timm

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from utils.data.samplers import TrainingSampler
from utils.runtime.errors import UserError
from utils.runtime.progress import Position
from utils.training.start_summary import print_plan


def parameters(name: str, classes: int) -> str:
    return f"{sum(tensor.numel() for tensor in timm.create_model(name, num_classes=classes).parameters()):,}"


def test_a_fresh_run_prints_model_weights_batch_rates_and_objective(train, capsys):
    train(policy_gradient, "--epochs", 2, "--lr", 0.04)
    out = capsys.readouterr().out
    assert f"classifier: test_resnet, {parameters('test_resnet', 3)} parameters; weights: random (--seed 0)\n" in out
    assert "policy: test_resnet, " in out
    assert "global batch: 1 process x 8 = 8 images; 4 steps an epoch, 2 epochs in all\n" in out
    assert "images: RGB, crops of 32 pixels, --mean 0.3162 --std 0.3213\n" in out
    assert "learning rates of epoch 0: classifier 0.04, policy 0.004; --opt sgd, --lr-scheduler steplr\n" in out
    expected = f"by about ln(8^2) = {math.log(64):.1f}\n"
    assert f"objective: published: it multiplies the classifier's loss, and so its learning rate, {expected}" in out


@pytest.mark.parametrize("objective", ["published-unscaled", "reinforce"])
def test_other_objectives_and_uniform_masks_print_their_names_only(objective, train, capsys):
    train(policy_gradient, "--epochs", 1, "--objective", objective, "--mask-policy", "uniform")
    out = capsys.readouterr().out
    assert f"objective: {objective}\n" in out
    assert "policy: the same for all images (uniform), 0 parameters; weights: none to learn" in out


def test_a_resumed_run_prints_where_it_continues(train, capsys):
    folder = train(normal, "--epochs", 2, "--checkpoint-steps", 3)
    (folder / "checkpoint_prev.pth").rename(folder / "checkpoint.pth")  # of epoch 1, step 3
    capsys.readouterr()
    train(normal, "--resume", folder / "checkpoint.pth")
    out = capsys.readouterr().out
    assert f"resumed: {folder / 'checkpoint.pth'}, at step 3 of epoch 1 (both count from 0)\n" in out
    assert f"weights: those of {folder / 'checkpoint.pth'}\n" in out


def test_fine_tuning_and_evaluation_print_the_file_of_the_weights(train, capsys):
    folder = train(normal, "--epochs", 1)
    capsys.readouterr()
    train(normal, "--epochs", 1, "--finetune", folder / "model_0.pth", "--freeze-backbone", name="tuned")
    out = capsys.readouterr().out
    head = timm.create_model("test_resnet", num_classes=3).get_classifier()
    trained = sum(tensor.numel() for tensor in head.parameters())
    assert f"parameters, of which {trained:,} are trained; weights: those of {folder / 'model_0.pth'}\n" in out
    train(normal, "--test-only", "--resume", folder / "model_0.pth", name="tested")
    out = capsys.readouterr().out
    assert f"classifier: test_resnet, {parameters('test_resnet', 3)} parameters; weights: those of {folder}" in out


def test_what_cannot_start_prints_no_facts(train, capsys):
    with pytest.raises(UserError):
        train(normal, "--batch-size", 4096)
    assert "global batch" not in capsys.readouterr().out


def test_the_steps_are_those_of_a_whole_epoch_after_a_change_of_processes(capsys):
    args = argparse.Namespace(resume="c.pth", batch_size=8, epochs=2, opt="sgd", lr_scheduler="steplr", gray=True,
                              train_crop_size=32, mean=[0.5], std=[0.2])  # fmt: skip
    sampler = TrainingSampler(48, 8, seed=0)
    begun = Position(epoch=1, step=1, images=16)  # by two processes
    data, state = SimpleNamespace(sampler=sampler), SimpleNamespace(ema=None)
    settings = SimpleNamespace(micro_batches=1, class_weights=None)
    training = SimpleNamespace(data=data, state=state, settings=settings, learning_rates=dict)
    print_plan(SimpleNamespace(args=args, start=begun), training)
    assert "resumed: c.pth, at step 1 of epoch 1" in (out := capsys.readouterr().out)
    assert "1 process x 8 = 8 images; 6 steps an epoch, 2 epochs in all" in out
    args.epochs = 1
    print_plan(SimpleNamespace(args=args, start=begun), training)
    assert "6 steps an epoch, 1 epoch in all" in capsys.readouterr().out
