"""Ranks end with their launcher, loader workers with their rank, and joining has a limit; nothing is left behind."""

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
from tests.helpers.ranks import PATIENCE
from utils.runtime.lifetimes import _may_be_launcher

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


def is_there(pid):
    """Whether a process runs or is stopped; a zombie has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def left_of(pids, seconds):
    """The processes that still exist once all have ended or the time is over."""
    deadline = time.monotonic() + seconds
    while (left := set(filter(is_there, pids))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.parametrize(
    ("start", "environment", "stopped", "ends"),
    [
        ("lifetimes.end_with_launcher()", {"TORCHELASTIC_RUN_ID": "1"}, False, True),
        ("lifetimes.end_with_launcher()", {}, False, False),  # one from a shell may outlive it
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
        assert is_there(pid)
        launcher.kill()
        launcher.wait()
        assert left_of([pid], PATIENCE if ends else 1) == (set() if ends else {pid})
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        launcher.stdout.close()


@pytest.mark.parametrize(("parent", "ends"), [(1, True), (-1, True), (0, False)])
def test_a_launcher_that_ended_before_its_rank_looked_is_noticed(parent, ends):
    """The parent that was expected: process 1, none, or the right one."""
    expected = "os.getppid()" if parent == 0 else parent
    code = RANK.replace("START", f"lifetimes.end_with_parent({expected})").replace("time.sleep(600)", "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == (2 if ends else 0)


@pytest.mark.parametrize(
    ("command", "may_be"), [(b"/usr/bin/python\0torchrun", True), (b"torchrun\0x", True), (b"/sbin/init", False)]
)
def test_process_1_can_be_the_launcher_of_a_container(command, may_be, tmp_path):
    (tmp_path / "cmdline").write_bytes(command)
    assert _may_be_launcher(tmp_path / "cmdline") is may_be
    assert _may_be_launcher(tmp_path / "absent")


def ranks_of(life, count=2):
    """The process ids of a torchrun's ranks, as soon as they are there."""
    while True:
        assert not life.has_ended(), life.output.read_text()
        found = []
        for pid in families({life.process.pid}):
            with suppress(OSError):
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
        if len(found) >= count:
            return found
        time.sleep(0.01)


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["import", "joining", "training", "stopped"])
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
        elif moment in ("training", "stopped"):
            assert watch(life, folder, Aim(steps=5)), life.output.read_text()
        everything = families({life.process.pid}).keys()
        if moment == "stopped":
            for pid in everything - {life.process.pid}:
                os.kill(pid, signal.SIGSTOP)
        life.process.kill()
        life.process.wait()
        assert left_of(everything, PATIENCE) == set()
    finally:
        life.kill()
    found, damaged = positions(folder)
    assert damaged == 0
    assert bool(found) == (moment in ("training", "stopped"))


JOIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from utils.runtime.processes import join_processes, run_script
run_script(lambda: join_processes("cpu", 3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("master", ["nobody listens", "nobody answers", "the others do not come"])
def test_joining_ends_within_the_timeout(master, tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=5) as server:
        port = server.getsockname()[1]
        if master == "nobody listens":
            server.close()
        rank = 0 if master == "the others do not come" else 1
        if rank == 0:
            server.close()
        error_file = tmp_path / "error.json"
        environment = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment["TORCHELASTIC_ERROR_FILE"] = error_file
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
        done = subprocess.run(
            [sys.executable, "-c", JOIN],
            env={**inherited, **{name: str(value) for name, value in environment.items()}},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 2
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"error: rank {rank} could not join the other 2 within --timeout 3 seconds" in said
    assert f"reach 127.0.0.1:{port}." in said
    assert "Traceback" not in done.stderr
    assert "error: " + json.loads(error_file.read_text())["message"]["message"] == said
