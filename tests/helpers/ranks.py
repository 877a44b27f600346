"""Ranks without torchrun that start warm: forks of a process that has imported everything; a start is 2 s, not 10."""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from _normal import train as normal  # noqa: F401 (what is imported here is there when a rank starts)
from _policy_gradient import train as policy_gradient  # noqa: F401
from tests.conftest import ROOT
from utils.runtime.processes import run_script

PATIENCE = 120  # seconds; no test asserts a time, but none hangs for ever either


def start_ranks(script: str, arguments: list[str], processes: int, stdout: Path, stderr: Path) -> list[BaseProcess]:
    """Start a script of the repository as so many ranks on this machine; what they say is added to the files."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    stdout.touch()
    stderr.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.ranks"])
    ranks = []
    for rank in range(processes):
        environment = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        ranks.append(context.Process(target=_run_rank, args=(script, environment, arguments, stdout, stderr)))
    with patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):  # the process that is forked must find this file
        for rank in ranks:
            rank.start()
    return ranks


def _run_rank(script: str, environment: dict[str, str], arguments: list[str], stdout: Path, stderr: Path) -> None:
    """What `python SCRIPT` does with these arguments."""
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a run from the command line
    for number, path in enumerate((stdout, stderr), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = [script, *arguments]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    run_script(module.main)


def run_ranks(script: str, *arguments: object, processes: int, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script as so many ranks to their end; as `run_script`, the exit code being the greatest of theirs."""
    with TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        ranks = start_ranks(script, list(map(str, arguments)), processes, *files)
        for rank in ranks:
            rank.join(PATIENCE)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        said = [path.read_text() for path in files]
    assert None not in codes, (codes, said)
    assert not check or not any(codes), (codes, said)
    return subprocess.CompletedProcess([script, *arguments], max(map(abs, codes)), *said)
