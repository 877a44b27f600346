"""Warm starts of the scripts, with and without torchrun: forks of a process that has imported everything.

A start takes less than a second, where `torchrun SCRIPT` imports for ten.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from experiments import fork_server
from tests.conftest import ROOT
from utils.runtime.lifetimes import end_with_launcher
from utils.runtime.processes import run_script

PATIENCE = 120  # seconds; no test asserts a time, but none hangs for ever either


fork_server.PRELOAD.append(__name__)


def call_warm(function: Callable, *arguments: object) -> Any:
    """The result of a function of a module, called in a fork of the warm process."""
    with ProcessPoolExecutor(1, fork_server.server(), initializer=fork_server.receive_signals) as pool:
        return pool.submit(function, *arguments).result(PATIENCE)


def start_warm(
    target: Callable[..., None], *arguments: object, stdout: Path | None, stderr: Path | None, cwd: Path = ROOT
) -> BaseProcess:
    """Call a function in a fork of the warm process; its output is added to the files. None: closed."""
    with ExitStack() as files:
        streams = [None if path is None else files.enter_context(path.open("ab")).fileno() for path in (stdout, stderr)]
        return fork_server.start(target, *arguments, stdout=streams[0], stderr=streams[1], cwd=cwd)


def _run(script: str, arguments: Sequence[str]) -> None:
    """What `python SCRIPT` does with these arguments."""
    sys.argv = [script, *arguments]
    end_with_launcher()
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    run_script(module.main)


def start_process(
    script: str,
    arguments: list[str],
    stdout: Path | None,
    stderr: Path | None,
    environment: dict[str, object] | None = None,
) -> BaseProcess:
    """Start a script of the repository as one process."""
    texts = {name: str(value) for name, value in (environment or {}).items()}
    return start_warm(_run_rank, texts, script, arguments, stdout=stdout, stderr=stderr)


def _run_rank(environment: dict[str, str], script: str, arguments: Sequence[str]) -> None:
    os.environ.update(environment)
    _run(script, arguments)


def _run_torchrun(options: Sequence[str], script: str, arguments: Sequence[str]) -> None:
    """What `torchrun OPTIONS SCRIPT` does, but that its ranks are forks."""
    parsed = parse_args([*options, "--start-method=fork", script])
    if parsed.standalone:  # as torch.distributed.run.run has it
        parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    configuration, _, _ = config_from_args(parsed)
    elastic_launch(configuration, _run_forked_rank)(script, arguments)


def _run_forked_rank(script: str, arguments: Sequence[str]) -> None:
    """As `_run`, without the signal handlers of torchrun's agent, which a real rank does not inherit."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _run(script, arguments)


def start_ranks(script: str, arguments: list[str], processes: int, stdout: Path, stderr: Path) -> list[BaseProcess]:
    """Start a script of the repository as ranks on this machine, without torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [start_process(script, arguments, stdout, stderr, environment) for environment in environments]


def start_torchrun(
    options: list[str], script: str, arguments: list[str], stdout: Path, stderr: Path, cwd: Path = ROOT
) -> BaseProcess:
    """Start a script of the repository by torchrun. options: torchrun's, such as --standalone --nproc_per_node=2."""
    return start_warm(_run_torchrun, options, script, arguments, stdout=stdout, stderr=stderr, cwd=cwd)


def run_ranks(script: str, *arguments: object, processes: int, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script as ranks without torchrun, to their end. As torchrun does, end the others soon after a failure."""
    with TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        ranks = running = start_ranks(script, list(map(str, arguments)), processes, *files)
        while running and not any(rank.exitcode for rank in ranks):
            assert wait([rank.sentinel for rank in running], PATIENCE), [path.read_text() for path in files]
            running = [rank for rank in running if rank.exitcode is None]
        for rank in running:
            rank.join(1)
        return _completed(ranks, [script, *arguments], files, check)


def run_torchrun(
    script: str, *arguments: object, processes: int, check: bool = True, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a script by `torchrun --standalone`, to its end."""
    with TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        options = ["--standalone", f"--nproc_per_node={processes}"]
        launcher = start_torchrun(options, script, list(map(str, arguments)), *files, cwd)
        launcher.join(PATIENCE)
        return _completed([launcher], [script, *arguments], files, check)


def _completed(
    processes: list[BaseProcess], command: list[object], files: tuple[Path, Path], check: bool
) -> subprocess.CompletedProcess[str]:
    """The output and the greatest exit code of the processes that have ended; the others are killed."""
    codes = [abs(process.exitcode) for process in processes if process.exitcode is not None]
    for process in processes:
        process.kill()
        process.join()
    output = [path.read_text() for path in files]
    assert codes, output
    assert not check or not any(codes), (codes, output)
    return subprocess.CompletedProcess(command, max(codes), *output)
