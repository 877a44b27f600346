"""Runs of two processes that tests kill, stop and signal: `soak.Life` with warm starts."""

from pathlib import Path

from benchmarks import soak
from tests.conftest import ROOT
from tests.helpers.ranks import PATIENCE, start_ranks, start_torchrun

SCRIPT = f"{soak.SCRIPT}/train.py"


def script_flags(command: list[str]) -> list[str]:
    """What a command of `soak.command` gives the script."""
    return command[command.index(str(ROOT / SCRIPT)) + 1 :]


class WarmLife(soak.Life):
    """A run of two ranks without torchrun."""

    def __init__(self, command: list[str], output: Path) -> None:
        self.output = output
        self.ranks = start_ranks(SCRIPT, script_flags(command), 2, output, output)

    def has_ended(self) -> bool:
        return all(rank.exitcode is not None for rank in self.ranks)

    def kill(self) -> None:
        soak.kill_families({rank.pid for rank in self.ranks if rank.exitcode is None})

    def exit_code(self) -> int | None:
        """The greatest exit code; None if a rank has not ended in time."""
        for rank in self.ranks:
            rank.join(PATIENCE)
        codes = [rank.exitcode for rank in self.ranks]
        return None if None in codes else max(map(abs, codes))


class TorchrunLife(WarmLife):
    """A torchrun with two ranks. options: further ones of torchrun."""

    def __init__(self, command: list[str], output: Path, *options: str) -> None:
        self.output = output
        options = ["--standalone", "--nproc_per_node=2", *options]
        self.process = start_torchrun(options, SCRIPT, script_flags(command), output, output)
        self.ranks = [self.process]

    def children(self) -> list[int]:
        """The process ids of the ranks, in their order."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return sorted(map(int, path.read_text().split()))
