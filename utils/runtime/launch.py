"""This process's place among the ranks, as torchrun or Slurm gave it. Imports no torch.

Only this module reads RANK, WORLD_SIZE, LOCAL_RANK and Slurm's variables.
"""

import os
import re
from typing import NamedTuple


class Launch(NamedTuple):
    """This process's place, as the launcher gave it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_launch(environment: dict[str, str]) -> Launch | None:
    """This process's place, from the environment; None for a single process without a launcher.

    torchrun's RANK wins. Slurm's variables count only in a job step of several tasks: a plain `python` in a batch
    script also sees SLURM_PROCID, and would wait for the others forever.
    """
    if "RANK" in environment:
        return Launch(
            rank=int(environment["RANK"]),
            world_size=int(environment.get("WORLD_SIZE", 1)),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", 1)),
        )
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1:
        # "1" or "a100:1": each task sees only its own GPU, as device 0
        if environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1":
            return Launch(int(environment["SLURM_PROCID"]), tasks, 0, 1)
        nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
        return Launch(int(environment["SLURM_PROCID"]), tasks, int(environment["SLURM_LOCALID"]), -(-tasks // nodes))
    return None


def slurm_rendezvous(environment: dict[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for a Slurm step, where no launcher sets them: its first node, and a port.

    The port differs between jobs and is in 20000..29999, below the range that Linux gives to outgoing connections.
    """
    one_node = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
    address = "127.0.0.1" if one_node else first_node(environment["SLURM_STEP_NODELIST"])
    port = 20000 + int(environment.get("SLURM_JOB_ID", 0)) % 10000
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def first_node(nodes: str) -> str:
    """The first name in a list of Slurm's, such as "gpu[03-05,9],login1": "gpu03"."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def current_launch() -> Launch:
    """This process's place, known before (or without) a process group."""
    return read_launch(os.environ) or Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)


def is_launched() -> bool:
    """Whether a launcher started this process, alone or as one of several ranks."""
    return read_launch(os.environ) is not None


def is_first_on_node() -> bool:
    """Whether this is the first process of its node."""
    if is_launched() and "RANK" not in os.environ:  # in Slurm local_rank is 0 in every task that sees only its own GPU
        return os.environ["SLURM_LOCALID"] == "0"
    return current_launch().local_rank == 0
