"""Joins the other ranks at the start of a run."""

import ctypes
import os
import threading
import warnings

import torch

from utils.runtime import distributed, processes
from utils.runtime.errors import UserError, first_line
from utils.runtime.launch import current_launch, is_first_on_node, is_launched
from utils.runtime.node_limits import explain


def join_processes(device_name: str | None, timeout_seconds: float = 600) -> torch.device:
    """Join the process group and return this process's device.

    timeout_seconds: how long a rank waits for the others, here and in each later collective. A process that has not
    joined by then ends. Raises UserError for a device that this node lacks, and if joining fails.
    """
    timeout_seconds = min(timeout_seconds, 1e6)  # torch and threading refuse much larger numbers

    processes.use_group(distributed)

    def give_up() -> None:
        processes.end_at_once(_not_joined(timeout_seconds, "no answer"))

    timer = threading.Timer(timeout_seconds, give_up)  # torch limits each step of joining, not all together
    timer.daemon = True
    if is_launched():
        timer.start()
    if current_launch().rank != 0:
        warnings.simplefilter("ignore")  # rank 0 prints them for all
    try:
        device = distributed.initialize(device_name, timeout_seconds)
    except (UserError, ValueError) as error:  # of this node: its devices, or variables that are not set
        raise UserError(str(error), agreed=not is_first_on_node()) from None
    except Exception as error:
        if explain(error) is None and distributed.is_lost_contact(error):
            raise UserError(_not_joined(timeout_seconds, first_line(error))) from None
        raise
    finally:
        timer.cancel()
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _not_joined(seconds: float, reason: str) -> str:
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    launch = current_launch()
    return (
        f"rank {launch.rank} could not join the other {launch.world_size - 1} within "
        f"--timeout {seconds:g} seconds ({reason}): see what the others printed, and whether all were started and "
        f"reach {address}."
    )


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_freed_memory(keep: bool = True) -> None:
    """Keep freed memory in the process, instead of returning it to the system. Does nothing without glibc.

    A training step frees hundreds of megabytes of activations. By default glibc returns large blocks to the system,
    which clears all their pages again for the next step: a third of a joint step of two resnet10t on two cores.
    keep: False restores glibc's default.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1 if keep else 128 * 1024)
        mallopt(M_MMAP_MAX, 0 if keep else 65536)
