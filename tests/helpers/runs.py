"""Whole runs, and comparisons of what they leave."""

import json

import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY
from utils.results.log import read_log

SCRIPTS = {"_normal": (normal, SMALL), "_policy_gradient": (policy_gradient, SMALL_POLICY)}
RICH = ["--model-ema", "--model-ema-steps", "2", "--mixup-alpha", "0.2", "--auto-augment", "ta_wide", "--ra-sampler",
        "--opt", "adamw", "--lr", "0.01", "--lr-scheduler", "cosineannealinglr", "--lr-warmup-epochs", "1"]  # fmt: skip


def assert_same(one, other, where=""):
    """Equal bit for bit: tensors, numbers, and what holds them."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        same = (one == other) | (one.isnan() & other.isnan()) if one.is_floating_point() else one == other
        assert same.all(), where
    else:
        assert one == other, where


def state_of(folder, name="checkpoint.pth"):
    """A file's content without what may differ: folders and workers."""
    state = torch.load(folder / name, weights_only=True)
    for free in ("checkpoint_steps", "output_dir", "plot_every", "resume", "tensorboard", "tracker", "workers"):
        state["args"].pop(free)
    return state


def status_of(folder):
    return json.loads((folder / "status.json").read_text())


def log_of(folder):
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in read_log(folder)]


def assert_same_run(whole, part, but=frozenset()):
    names = {path.name for path in whole.glob("*.pth")} - {"checkpoint_prev.pth", *but}
    assert names == {path.name for path in part.glob("*.pth")} - {"checkpoint_prev.pth", *but}
    for name in names:
        assert_same(state_of(whole, name), state_of(part, name), name)
    assert_same(log_of(whole), log_of(part))


def run_script(name, data, folder, *flags):
    script, small = SCRIPTS[name]
    script.main([*small, "--data-path", str(data), "--output-dir", str(folder), "--lr", "0.01", *flags])
