"""Ranks, devices and collectives.

A single process without a launcher has no process group; every collective below then returns its input.
"""

import contextlib
import inspect
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.runtime.errors import UserError
from utils.runtime.launch import current_launch, is_launched, slurm_rendezvous

FAILURE_KEY = "failure"
_store: dist.Store | None = None  # of the process group; a failing rank leaves its message there


def resolve_device(name: str | None, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """The device of this process. name: None for CUDA if available, else the CPU.

    Raises UserError, with advice, for a device that this node lacks; the same error in all its processes.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = name or ("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; give cuda or cpu.") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {name}: only cuda and cpu are supported.")
    if not available:
        raise UserError(f"--device {name}: PyTorch finds no CUDA device here; give --device cpu.")
    if local_world_size > 1 and device.index is not None:
        raise UserError(f"--device {name}: each process needs its own GPU; give --device cuda.")
    if max(local_world_size, (device.index or 0) + 1) > available:
        raise UserError(
            f"--device {name}: this node has {available} GPUs, and every process needs its own; start at most "
            f"{available} processes on it (--nproc_per_node)."
        )
    return torch.device("cuda", local_rank if device.index is None else device.index)


def initialize(device_name: str | None, timeout_seconds: float) -> torch.device:
    """Join the process group that the launcher describes (nccl on CUDA, gloo on the CPU) and return the device.

    A collective that another rank does not join within the timeout raises an exception on the CPU, and ends the process
    on CUDA. Raises UserError for a device that this node lacks, before anything waits for another process.
    """
    global _store
    launch = current_launch()
    device = resolve_device(device_name, launch.local_rank, launch.local_world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not is_launched():
        return device
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(slurm_rendezvous(os.environ))
    timeout = timedelta(seconds=timeout_seconds)
    _store, rank, world_size = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        _store = dist.PrefixStore(name_of_start(_store, rank, world_size, timeout_seconds), _store)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, store=_store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
    )
    return device


def name_of_start(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name for this start, equal on all ranks, and new: no earlier start with the same store had it.

    torchrun keeps one store over its restarts. Without a new prefix for each start, a rank would find the addresses of
    processes that have ended. (torchrun's count of restarts differs between nodes.) Rank 0 chooses the name. Another
    rank may read the name of an earlier start, so it accepts a name only once rank 0 has answered its call under it.
    Raises DistNetworkError if rank 0 does not answer in time.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("start", own)
        for caller in range(1, world_size):
            store.set(f"{own}/answer/{caller}", store.get(f"{own}/call/{caller}"))
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
    """Leave the process group, if any."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Elementwise mean over the ranks, without gradient. The same bits on every rank."""
    if world_size() == 1:
        return tensor.detach()
    reduced = tensor.detach().clone()
    dist.all_reduce(reduced)
    return reduced / world_size()


def combine(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Several tensors over all ranks, in one collective: means elementwise; for bools, whether any rank has True.

    Without gradient, computed in float64, in each tensor's own dtype, and with the same bits on every rank. A single
    process gets its own tensors back.
    """
    own = [tensor.detach() for tensor in tensors]
    if world_size() == 1:
        return own
    values = torch.cat([tensor.flatten() for tensor in own]).double()
    dist.all_reduce(values)
    parts = (values / world_size()).split([tensor.numel() for tensor in own])
    # A positive mean is True as a bool.
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, own, strict=True)]


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


@contextmanager
def agreed() -> Iterator[None]:
    """Run a block that may fail on some ranks only; then all ranks raise the first UserError.

    The block must not contain collectives.
    """
    own_message = None
    try:
        yield
    except UserError as error:
        own_message = str(error)
    messages = [message for message in all_gather_object(own_message) if message is not None]
    if messages:
        raise UserError(messages[0], agreed=True)


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers to every rank: without SyncBN, BatchNorm statistics drift apart during an epoch."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """The module in DistributedDataParallel; unchanged without a process group or trainable parameters.

    Buffers are broadcast here, not at every step: training does not read them, and evaluation broadcasts them first.
    """
    if not dist.is_initialized() or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    broadcast_buffers(module)
    device_ids = [device.index] if device.type == "cuda" else None
    # torch 2.14 renamed broadcast_buffers.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    no_broadcast = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True, **no_broadcast)


def unsynchronized(module: nn.Module) -> AbstractContextManager:
    """A context in which backward passes do not average gradients over the processes."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def unwrap(module: nn.Module | None) -> nn.Module | None:
    """The module inside `wrap`."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def post_failure(message: str) -> None:
    """Leave a message for the other ranks: this rank stops, and why."""
    if _store is not None:
        with contextlib.suppress(Exception):  # the store's host may have ended; the message is optional
            _store.set(FAILURE_KEY, message.encode(errors="backslashreplace").decode())


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended or did not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def failure_posted() -> bool:
    """Whether another rank has left a message that it stops. An error here is then only its closed connection."""
    if _store is None:
        return False
    try:
        return _store.check([FAILURE_KEY])
    except Exception:  # the store ended with the rank that hosted it
        return False
