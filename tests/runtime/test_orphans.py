"""Ranks end with their launcher, loader workers with their rank, and joining has a time limit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak import Aim, Life, families, positions, watch
from tests.conftest import ROOT, write_image_folder
from tests.helpers.ranks import PATIENCE, start_process
from utils.runtime import lifetimes
from utils.runtime.joining import join_processes

LAUNCHER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(600)
"""
RANK = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from utils.runtime import lifetimes
START
print(os.getpid(), flush=True)
time.sleep(600)
"""


def exists(pid):
    """Whether a process exists, running or stopped; a zombie has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def remaining(pids, seconds):
    """The processes that still exist when all have ended or the time is up."""
    deadline = time.monotonic() + seconds
    while (left := set(filter(exists, pids))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "environment", "stopped", "ends"),
    [
        ("lifetimes.end_with_launcher()", {"TORCHELASTIC_RUN_ID": "1"}, False, True),
        ("lifetimes.end_with_launcher()", {}, False, False),  # a process from a shell may outlive the shell
        ("lifetimes.end_with_parent(os.getppid())", {}, True, True),  # as a loader worker that is stopped
    ],
)
def test_a_process_ends_with_the_one_that_started_it(start, environment, stopped, ends):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK.replace("START", start)],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(launcher.stdout.readline())
    try:
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        assert exists(pid)
        launcher.kill()
        launcher.wait()
        assert remaining([pid], PATIENCE if ends else 1) == (set() if ends else {pid})
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        launcher.stdout.close()


@pytest.mark.parametrize(("parent", "exit_code"), [("-1", 2), ("os.getppid()", 0)])
def test_a_parent_that_ended_before_its_child_started_is_noticed(parent, exit_code):
    code = RANK.replace("START", f"lifetimes.end_with_parent({parent})").replace("time.sleep(600)", "")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == exit_code


@pytest.mark.parametrize(("command", "ends"), [(b"/usr/bin/python\0torchrun", False), (b"/sbin/init", True)])
def test_process_1_can_be_the_launcher_of_a_container(command, ends, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: command)
    exit_codes = []
    monkeypatch.setattr(os, "_exit", exit_codes.append)
    monkeypatch.setattr(lifetimes, "end_with_parent", lambda _: None)
    lifetimes.end_with_launcher()
    assert exit_codes == [2] * ends


def ranks_of(life, count=2):
    """The process ids of a torchrun's ranks, once they all exist."""
    while True:
        assert not life.has_ended(), life.output.read_text()
        ranks = []
        for pid in families({life.process.pid}):
            with suppress(OSError):
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    ranks.append(pid)
        if len(ranks) >= count:
            return ranks
        time.sleep(0.01)


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["import", "joining", "training with all ranks stopped"])
def test_nothing_outlives_a_torchrun_that_is_killed(moment, tmp_path):
    data, folder = write_image_folder(tmp_path / "data"), tmp_path / "run"
    flags = ("--batch-size", 2, "--epochs", 200, "--checkpoint-steps", 3, "--workers", 1)
    life = Life(soak.command(data, folder, 2, *flags), tmp_path / "output.txt")
    try:
        ranks = ranks_of(life)
        if moment == "joining":  # one rank waits for the other, which is stopped while it imports
            while "libtorch" not in Path(f"/proc/{ranks[1]}/maps").read_text():
                time.sleep(0.01)
            os.kill(ranks[1], signal.SIGSTOP)
            spent = -1
            while spent != (spent := cpu_seconds(ranks[0])):
                time.sleep(2)
        elif moment != "import":
            assert watch(life, folder, Aim(steps=5)), life.output.read_text()
        everything = families({life.process.pid}).keys()
        if moment not in ("import", "joining"):
            for pid in everything - {life.process.pid}:
                os.kill(pid, signal.SIGSTOP)
        life.process.kill()
        life.process.wait()
        assert remaining(everything, PATIENCE) == set()
    finally:
        life.kill()
    checkpoints, damaged = positions(folder)
    assert damaged == 0
    assert bool(checkpoints) == (moment not in ("import", "joining"))


def main():
    """For the processes below: join the others, which never come."""
    join_processes("cpu", 1)


@pytest.mark.slow
@pytest.mark.parametrize("master", ["nobody listens", "nobody answers", "the others do not come"])
def test_joining_ends_within_the_timeout(master, tmp_path):
    rank = 0 if master == "the others do not come" else 1
    output, error_file = tmp_path / "output", tmp_path / "error.json"
    output.touch()
    with socket.create_server(("127.0.0.1", 0), backlog=5) as server:
        port = server.getsockname()[1]
        if master != "nobody answers":
            server.close()
        environment = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment["TORCHELASTIC_ERROR_FILE"] = error_file
        process = start_process("tests/runtime/test_orphans.py", [], output, output, environment)
        process.join(PATIENCE)
    assert process.exitcode == 2
    printed = output.read_text()
    [message] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert f"error: rank {rank} could not join the other 2 within --timeout 1 seconds" in message
    assert f"reach 127.0.0.1:{port}." in message
    assert "Traceback" not in printed
    assert "error: " + json.loads(error_file.read_text())["message"]["message"] == message
