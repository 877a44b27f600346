"""--help and errors in flags are answered before torch and other heavy packages are loaded."""

import json
import os
import re
import subprocess
import sys

import pytest

from _normal.flags import build_parser as normal_parser
from _policy_gradient.flags import build_parser as policy_gradient_parser
from _policy_gradient.flags import gallery_parser
from tests.conftest import ROOT
from utils import arguments
from utils.audit.flags import audit_parser
from utils.inference.flags import averaging_parser, export_parser, predict_parser, probe_parser
from utils.results.flags import plots_parser, report_parser
from utils.runtime.errors import UserError

HEAVY = {"torch", "torchvision", "timm", "numpy", "PIL", "scipy", "tqdm", "matplotlib", "huggingface_hub"}
PARSERS = {
    "_normal/train.py": normal_parser(),
    "_policy_gradient/train.py": policy_gradient_parser(),
    "_policy_gradient.gallery": gallery_parser(""),
    "utils.audit": audit_parser(""),
    "utils.plots": plots_parser(""),
    "utils.report": report_parser(""),
    "utils.predict": predict_parser(),
    "utils.export": export_parser(),
    "utils.probe": probe_parser(""),
    "utils.weight_averaging": averaging_parser(""),
}
# Runs a script or module as a program, and writes which modules were loaded. A rank does not wait for torchrun's end.
PROGRAM = """
import atexit, pathlib, runpy, sys, time
time.sleep = lambda seconds: print("waits", seconds)
report, name = sys.argv[1:3]
sys.argv[:3] = [name]
atexit.register(lambda: pathlib.Path(report).write_text(" ".join(sys.modules)))
if name.endswith(".py"):
    runpy.run_path(name, run_name="__main__")
else:
    sys.path.insert(0, "")
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def run(tmp_path):
    """run(name, *words, **environment): the ended program, which has loaded no heavy package."""

    def run(name: str, *words: str, **environment: object) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "COLUMNS": "100", **{key: str(value) for key, value in environment.items()}}
        command = [sys.executable, "-c", PROGRAM, tmp_path / "modules", name, *words]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert HEAVY & set((tmp_path / "modules").read_text().split()) == set()
        return done

    return run


def error_of(parser: arguments.Parser, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        arguments.parse_given(parser, words)
    return f"error: {caught.value}\n"


@pytest.mark.parametrize("name", PARSERS)
def test_a_misspelt_flag_is_answered_without_heavy_imports(name, run):
    words = [*(["curves"] if name == "utils.plots" else []), "--outptu", "x"]
    done = run(name, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == error_of(PARSERS[name], *words)
    assert re.search("; --outptu: did you mean .*--output", done.stderr)


@pytest.mark.parametrize("name", PARSERS)
def test_help_is_answered_without_heavy_imports(name, run, monkeypatch):
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    if name.endswith(".py"):
        monkeypatch.setenv("COLUMNS", "100")
        parser = PARSERS[name]
        parser.prog = "train.py"
        assert done.stdout == parser.format_help()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--epochs", "1000001"), "--epochs 1000001: expected at most 100000."),
        (("--tracker", "none", "wandb"), "--tracker none wandb: give none alone, or leave it out."),
        (("--model", "local-dir:x", "--opt", "sdg"), "argument --opt: invalid choice: 'sdg'"),
    ],
)
def test_values_that_no_run_could_use_are_answered_without_heavy_imports(words, sentence, run):
    done = run("_normal/train.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sentence}")


def test_of_several_ranks_only_rank_0_prints_and_all_fail(run, tmp_path):
    report = tmp_path / "error.json"
    torchrun = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_ERROR_FILE": report}
    other = run("_normal/train.py", "--ephocs", "3", RANK=1, LOCAL_RANK=1, **torchrun)
    assert (other.returncode, other.stdout, other.stderr) == (2, "waits 10\n", "")
    assert not report.exists()
    first = run("_normal/train.py", "--ephocs", "3", RANK=0, LOCAL_RANK=0, **torchrun)
    assert (first.returncode, first.stdout) == (2, "")
    assert first.stderr == error_of(PARSERS["_normal/train.py"], "--ephocs", "3")
    assert f"error: {json.loads(report.read_text())['message']['message']}\n" == first.stderr


def test_commands_that_prepare_data_never_load_torch():
    names = ("phantoms.__main__", "medmnist", "prepare.__main__", "radimagenet.__main__")
    code = f"import sys, {', '.join(f'utils.{name}' for name in names)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert {"torch", "torchvision", "timm", "matplotlib"} & set(done.stdout.split()) == set()
