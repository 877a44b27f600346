"""Processes and devices: who am I, who else is there, and what do we agree on?

This module alone reads RANK, WORLD_SIZE, LOCAL_RANK and Slurm's variables, and imports nothing else of the project.
With one process and no launcher there is no process group, and every collective below returns its input.
"""

import contextlib
import inspect
import os
import time
import uuid
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FAILURE_KEY = "failure"
_store: dist.Store | None = None  # what the process group was built on; a failing rank leaves its message there


class Launch(NamedTuple):
    """What the launcher said of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_launch(environment: dict[str, str]) -> Launch | None:
    """This process's place, out of the environment, or None for a single process without a launcher.

    torchrun's RANK wins. Slurm's variables count only inside a job step of more than one task: a plain `python` in a
    batch script sees SLURM_PROCID too, and would wait for ever for the others.
    """
    if "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Launch(*(int(environment.get(name, default)) for name, default in zip(names, (0, 1, 0, 1), strict=True)))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1:
        if environment.get("SLURM_GPUS_PER_TASK") == "1":  # each task sees its own GPU only, as device 0
            return Launch(int(environment["SLURM_PROCID"]), tasks, 0, 1)
        nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
        return Launch(int(environment["SLURM_PROCID"]), tasks, int(environment["SLURM_LOCALID"]), -(-tasks // nodes))
    return None


def slurm_rendezvous(environment: dict[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for a Slurm step whose launcher set none: the node and job that srun runs in.

    The port lies in 20000..29999, below the range Linux gives to outgoing connections, and differs between jobs.
    """
    one_node = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
    address = "127.0.0.1" if one_node else environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    port = 20000 + int(environment.get("SLURM_JOB_ID", 0)) % 10000
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def resolve_device(name: str | None, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """The device of this process; None means CUDA where there is one, else the CPU.

    Raises ValueError, with what to do, for a device that this node does not have; alike in all its processes.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = name or ("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: not a device; give cuda or cpu.") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"--device {name}: only cuda and cpu are supported.")
    if not available:
        raise ValueError(f"--device {name}: PyTorch finds no CUDA device here; give --device cpu.")
    if local_world_size > 1 and device.index is not None:
        raise ValueError(f"--device {name}: each process needs its own GPU; give --device cuda.")
    if max(local_world_size, (device.index or 0) + 1) > available:
        raise ValueError(
            f"--device {name}: this node has {available} GPUs, and every process needs its own; start at most "
            f"{available} processes on it (--nproc_per_node)."
        )
    return torch.device("cuda", local_rank if device.index is None else device.index)


def initialize(device_name: str | None, timeout_seconds: float) -> torch.device:
    """Join the process group that the launcher describes (nccl on CUDA, gloo on the CPU); returns the device.

    A collective that another rank does not join within the timeout fails, on the CPU by an exception, on CUDA by the
    end of the process.

    Raises ValueError for a device that is not there, before anything waits for another process.
    """
    global _store
    launch = read_launch(os.environ)
    local = (launch.local_rank, launch.local_world_size) if launch else ()
    device = resolve_device(device_name, *local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch is None:
        return device
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(slurm_rendezvous(os.environ))
    timeout = timedelta(seconds=timeout_seconds)
    _store, rank, world_size = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        _store = dist.PrefixStore(name_of_start(_store, rank, world_size, timeout_seconds), _store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(
        backend, store=_store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
    )
    return device


def name_of_start(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name for this start of all ranks, equal on all, that no earlier start with the same store has had.

    torchrun keeps one store over its restarts: without a prefix for each, a rank finds the addresses of processes that
    are gone. (Its count of restarts is each node's own.) Rank 0 invents the name; another rank believes a name that it
    reads only once rank 0 has answered it, and reads again otherwise.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("start", own)
        for other in range(1, world_size):
            store.set(f"{own}/answer/{other}", store.get(f"{own}/call/{other}"))
        return own
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        name = store.get("start").decode()
        store.set(f"{name}/call/{rank}", own)
        answer = f"{name}/answer/{rank}"
        if store.check([answer]) and store.get(answer).decode() == own:
            return name
        time.sleep(0.05)
    raise dist.DistNetworkError(f"rank 0 gave no answer within {timeout_seconds:g} s")


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def launched_rank() -> int:
    """This process's rank, known even before (or without) a process group."""
    launch = read_launch(os.environ)
    return launch.rank if launch else 0


def is_launched() -> bool:
    """Whether a launcher started this process as one of several ranks, or as the only one."""
    return read_launch(os.environ) is not None


def launched_world_size() -> int:
    """The number of processes that the launcher started, known even before (or without) a process group."""
    launch = read_launch(os.environ)
    return launch.world_size if launch else 1


def is_first_on_node() -> bool:
    """True for one process of each node."""
    launch = read_launch(os.environ)
    if launch is None:
        return True
    # Slurm's own number where each task sees one GPU only, as device 0.
    return launch.local_rank == 0 if "RANK" in os.environ else os.environ["SLURM_LOCALID"] == "0"


def local_world_size() -> int:
    """The number of processes on this node."""
    launch = read_launch(os.environ)
    return launch.local_world_size if launch else 1


def in_process_group() -> bool:
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks, elementwise, on the device; without gradient. Equal bits on every rank."""
    return all_reduce_sum(tensor) / world_size() if world_size() > 1 else tensor.detach()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the ranks, elementwise, on the device; without gradient. A single process gets its own tensor back."""
    if world_size() == 1:
        return tensor.detach()
    reduced = tensor.detach().clone()
    dist.all_reduce(reduced)
    return reduced


def all_gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers (BatchNorm statistics drift apart during an epoch without SyncBN)."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel round a module that learns; the module itself in a single process or without parameters.

    Buffers are broadcast here, but not at every step: training never reads them, and evaluation broadcasts them first.
    """
    if not dist.is_initialized() or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    broadcast_buffers(module)
    device_ids = [device.index] if device.type == "cuda" else None
    # torch 2.14 renamed the argument.
    names = inspect.signature(DistributedDataParallel).parameters
    no_broadcast = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True, **no_broadcast)


def unwrap(module: nn.Module | None) -> nn.Module | None:
    """The module inside `wrap`."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def post_failure(message: str) -> None:
    """Leave word for the other ranks that this one stops, and why."""
    if _store is not None:
        with contextlib.suppress(Exception):  # the store's host may be gone, and the message is a courtesy
            _store.set(FAILURE_KEY, message.encode(errors="backslashreplace").decode())


def is_lost_contact(error: BaseException) -> bool:
    """True if a collective failed since another rank ended or did not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def failure_posted() -> bool:
    """True if another rank has left word that it stops: the error at hand is only the connection it closed."""
    if _store is None:
        return False
    try:
        return _store.check([FAILURE_KEY])
    except Exception:  # the store went away with the rank that hosted it
        return False
