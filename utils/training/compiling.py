"""--compile: compiles networks, checks what this needs on the machine, and explains failures in one sentence."""

import subprocess

import torch
from torch import nn

from utils.runtime.errors import UserError

NEEDS = "a C++ compiler (CXX, else g++), Python's headers (python3-dev) and, on a GPU, Triton and a C compiler"


def compile_in_place(module: nn.Module, device: torch.device, cuda_graphs: bool = True) -> None:
    """torch.compile without renaming keys.

    cuda_graphs: use them on a GPU, where small batches would wait for the host.
    """
    module.compile(mode="reduce-overhead" if cuda_graphs and device.type == "cuda" else None)


def check_compiler(device: torch.device) -> None:
    """Compile and run one small function; raises UserError if that fails."""
    try:
        torch.compile(lambda values: values.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the type depends on what is missing
        raise UserError(
            f"--compile: torch.compile does not work on {device} ({_reason(error)}). It needs {NEEDS}: install "
            "them, or leave out --compile."
        ) from None


def compile_failure(error: BaseException) -> str | None:
    """A sentence about an error of torch.compile; None for any other error."""
    from torch._dynamo.exc import TorchDynamoException

    kinds = (TorchDynamoException, subprocess.CalledProcessError)
    if not any(isinstance(cause, kinds) or "C compiler" in str(cause) for cause in _causes(error)):
        return None
    return (
        f"--compile: torch.compile failed ({_reason(error)}). It needs {NEEDS}; if these are installed, it cannot "
        "compile this model: leave out --compile."
    )


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and its chain of causes, the first cause last."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _reason(error: BaseException) -> str:
    """The first line that a compiler marks as an error, else the first line of the first cause."""
    texts = []
    for cause in _causes(error):
        outputs = (getattr(cause, "stderr", None), getattr(cause, "output", None))  # of a compiler
        texts += [text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in outputs if text]
        texts.append(str(cause))
    marked = [line for text in texts for line in text.splitlines() if "error: " in line]
    lines = marked or [line for text in reversed(texts) for line in text.splitlines() if line.strip()]
    return " ".join((lines or [type(error).__name__])[0].split())[:300]
