"""The paper by one command: its plan, its steps on a made-up RadImageNet, and the published figures next to them."""

import importlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from _policy_gradient import train as policy_gradient
from experiments import paper, published
from experiments.plan import read_plan
from tests.conftest import ROOT, write_image_folder
from tests.helpers.finished_runs import finish
from tests.helpers.radimagenet import as_distributed, pack
from utils.arguments import parse_given
from utils.runtime.errors import UserError

PLANS = ROOT / "experiments" / "plans"
TRIAL = str(PLANS / "paper_trial.py")


def call(words):
    """What `python WORDS` does, in this process."""
    if words[0] == "-m":
        name, arguments = words[1], words[2:]
    else:
        name, arguments = ".".join(Path(os.path.relpath(words[0], ROOT)).with_suffix("").parts), words[1:]
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    module.main(arguments)


@pytest.mark.slow
def test_from_the_archive_to_the_table(tmp_path, monkeypatch, capsys):
    images = write_image_folder(tmp_path / "made", ("ct-abd-normal", "mr-knee-acl", "us-liver"), images=44)
    archive = pack(as_distributed(images, tmp_path / "source"), tmp_path / "radimagenet.tar.gz")
    random = np.random.default_rng(0)
    content = {}
    for split, number in (("train", 12), ("val", 6), ("test", 6)):
        content[f"{split}_images"] = random.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        content[f"{split}_labels"] = np.arange(number)[:, None] % 2
    np.savez(tmp_path / "breastmnist.npz", **content)
    monkeypatch.setattr(paper, "execute", call)
    handlers = {number: signal.getsignal(number) for number in paper.stopping_signals()}
    output = tmp_path / "out"
    paper.main([str(tmp_path / "data"), "--source", str(archive), "--transfer", str(tmp_path / "breastmnist.npz"),
                "-o", str(output), "--plan", TRIAL, "--device", "cpu", "--processes", "1",
                "--flags", "--workers 0"])  # fmt: skip
    for number, handler in handlers.items():
        signal.signal(number, handler)
