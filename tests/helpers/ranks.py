"""Processes that start warm: forks of a server that has imported everything. A start takes a second, not ten."""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from _normal import train as normal  # noqa: F401 (the server imports it, so that a fork need not)
from _policy_gradient import train as policy_gradient  # noqa: F401
from tests.conftest import ROOT
from utils.runtime.processes import run_script

PATIENCE = 120  # seconds; no test asserts a time, but none waits forever either


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.ranks"])
    return context


def call_warm(function: Callable, *arguments: object) -> Any:
    """Return the result of a function of a module, called in a new process."""
    with patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}), ProcessPoolExecutor(1, _server()) as pool:
        return pool.submit(function, *arguments).result(PATIENCE)


def start_process(
    script: str,
    arguments: list[str],
    stdout: Path | None,
    stderr: Path | None,
    environment: dict[str, object] | None = None,
) -> BaseProcess:
    """Start a script of the repository; its output is added to the files, None: the descriptor is closed."""
    texts = {name: str(value) for name, value in (environment or {}).items()}
    process = _server().Process(target=_run, args=(script, texts, arguments, stdout, stderr))
    with patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):  # the server must find this file
        process.start()
    return process


def start_ranks(script: str, arguments: list[str], processes: int, stdout: Path, stderr: Path) -> list[BaseProcess]:
    """Start a script of the repository as several ranks on this machine; their output is added to the files."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    stdout.touch()
    stderr.touch()
    environments = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [start_process(script, arguments, stdout, stderr, environment) for environment in environments]


def _run(
    script: str, environment: dict[str, str], arguments: list[str], stdout: Path | None, stderr: Path | None
) -> None:
    """As `python SCRIPT ARGUMENTS` does it."""
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a run from the command line
    for number, (name, path) in enumerate((("stdout", stdout), ("stderr", stderr)), 1):
        if path is None:
            os.close(number)
            setattr(sys, name, None)
        else:
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = [script, *arguments]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    run_script(module.main)


def run_ranks(script: str, *arguments: object, processes: int, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script as several ranks to their end, as `run_script` does; the exit code is the greatest of theirs."""
    with TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        ranks = start_ranks(script, list(map(str, arguments)), processes, *files)
        for rank in ranks:
            rank.join(PATIENCE)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        outputs = [path.read_text() for path in files]
    assert None not in codes, (codes, outputs)
    assert not check or not any(codes), (codes, outputs)
    return subprocess.CompletedProcess([script, *arguments], max(map(abs, codes)), *outputs)
