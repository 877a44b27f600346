"""Commands in forks of the warm process: as typed ones, with shared locks, and able to outlive what started them."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver

import pytest
import torch

from _policy_gradient import train as policy_gradient
from experiments import fork_server
from tests.conftest import ROOT, SMALL_POLICY

pytestmark = pytest.mark.slow  # each worker starts a warm process, which imports for five seconds

REPORT = """
import multiprocessing, os, signal, sys
print(__name__, sys.argv, os.getcwd(), os.environ["MARK"], sys.stdin.read(), multiprocessing.get_start_method())
print([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)])
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), file=sys.stderr)
"""
STARTER = """
import sys, time
from _policy_gradient import train as policy_gradient
from experiments import fork_server
fork_server.PRELOAD.clear()
with open(sys.argv[1], "ab") as output:
    fork_server.Command([sys.executable, sys.argv[2], sys.argv[3]], output, {})
    print("started", flush=True)
    time.sleep(60)
"""
WAITER = """
import pathlib, sys, time
print("waits", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
print("ended by itself")
"""


def run_warm(words, output, **environment):
    """The exit code of `python WORDS...` in a fork; its output is appended to a file."""
    with output.open("ab") as file:
        return fork_server.Command([sys.executable, *map(str, words)], file, {**os.environ, **environment}).wait()


def is_locked(path):
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def waiting(tmp_path):
    """A script that runs until the file `end` exists, and the file of its output."""
    script, output = tmp_path / "waiter.py", tmp_path / "output.txt"
    script.write_text(WAITER)
    output.touch()
    try:
        yield script, output
    finally:
        (tmp_path / "end").touch()


@pytest.mark.parametrize("as_module", [False, True])
def test_a_command_runs_as_if_typed(as_module, tmp_path, monkeypatch):
    (tmp_path / "report.py").write_text(REPORT)
    monkeypatch.chdir(tmp_path)
    words = [*(["-m", "report"] if as_module else ["report.py"]), "--flag", "two words"]
    environment = {"MARK": "5", "PYTHONPATH": str(tmp_path)}
    typed = subprocess.run(
        [sys.executable, *words], env=os.environ | environment, capture_output=True, stdin=subprocess.DEVNULL, text=True
    )
    monkeypatch.syspath_prepend(tmp_path)  # the fork gets this process's path
    assert run_warm(words, tmp_path / "output.txt", **environment) == typed.returncode == 0
    assert (tmp_path / "output.txt").read_text() == typed.stdout + typed.stderr


@pytest.mark.parametrize(
    ("ending", "code", "last_line"),
    [
        ("sys.exit(75)", 75, ""),
        ("sys.exit('error: broken.')", 1, "error: broken."),
        ("raise ValueError('broken')", 1, "ValueError: broken"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
    ],
)
def test_exit_codes_are_those_of_a_typed_command(ending, code, last_line, tmp_path):
    script, output = tmp_path / "script.py", tmp_path / "output.txt"
    script.write_text(f"import os, signal, sys\n{ending}\n")
    assert run_warm([script], output) == code
    assert output.read_text().rstrip().split("\n")[-1] == last_line


def test_commands_of_many_threads_keep_their_exit_codes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(int(sys.argv[1]))")
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda code: run_warm([script, code], tmp_path / "output.txt"), range(12)))
    assert codes == list(range(12))


def test_a_command_holds_the_lock_on_its_output(tmp_path):
    with waiting(tmp_path) as (script, output):
        with output.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            command = fork_server.Command([sys.executable, str(script), str(tmp_path / "end")], file, os.environ)
        assert is_locked(output)
    assert command.wait() == 0
    assert not is_locked(output)


def test_a_signal_to_the_warm_process_ends_neither_it_nor_commands(tmp_path):
    with waiting(tmp_path) as (script, output), output.open("ab") as file:
        command = fork_server.Command([sys.executable, str(script), str(tmp_path / "end")], file, os.environ)
        server = forkserver._forkserver._forkserver_pid
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(server, number)
        other = fork_server.Command([sys.executable, str(script), str(tmp_path / "end")], file, os.environ)
        other.terminate()
        assert other.wait() == -signal.SIGTERM
        assert forkserver._forkserver._forkserver_pid == server
    assert command.wait() == 0


def test_a_command_outlives_the_killed_process_that_started_it_and_keeps_the_lock(tmp_path):
    with waiting(tmp_path) as (script, output):
        starter = subprocess.Popen(
            [sys.executable, "-c", STARTER, output, script, tmp_path / "end"], cwd=ROOT, stdout=subprocess.PIPE
        )
        with starter.stdout:
            starter.stdout.readline()
        wait_until(lambda: "waits" in output.read_text())
        starter.kill()
        starter.wait()
    wait_until(lambda: "ended by itself" in output.read_text())


def test_a_warm_process_that_ends_early_is_reported(tmp_path):
    (tmp_path / "ends.py").write_text("import os\nos._exit(0)")
    code = "from experiments import fork_server as f\nf.PRELOAD[:] = ['ends']\nf.start(print, stdout=1, stderr=2)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "ChildProcessError: the process that starts commands has ended" in result.stderr


def test_a_warm_training_gives_the_weights_of_one_in_this_process_bit_for_bit(image_folder, tmp_path):
    flags = [*SMALL_POLICY, "--data-path", image_folder, "--epochs", 1, "--objective", "reinforce", "--workers", 1]
    policy_gradient.main([*map(str, flags), "--output-dir", str(tmp_path / "here")])
    script = ROOT / "_policy_gradient" / "train.py"
    assert run_warm([script, *flags, "--output-dir", tmp_path / "warm"], tmp_path / "output.txt") == 0
    states = [torch.load(tmp_path / name / "checkpoint.pth") for name in ("here", "warm")]
    for part in ("model", "policy_net"):
        assert states[0][part].keys() == states[1][part].keys()
        assert all(torch.equal(value, states[1][part][key]) for key, value in states[0][part].items())
    command = json.loads((tmp_path / "warm" / "run.json").read_text())["starts"][0]["command"]
    assert command.split()[1:] == list(map(str, [*flags, "--output-dir", tmp_path / "warm"]))
