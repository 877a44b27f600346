"""What --compile needs on this machine, and why it failed, in a sentence."""

import subprocess

import torch

from utils.runtime.errors import UserError

NEEDS = "a C++ compiler (CXX names it, else g++), Python's headers (python3-dev) and, on a GPU, Triton and a C compiler"


def check_compiler(device: torch.device) -> None:
    """Compile and run one small function; raises UserError where that fails."""
    try:
        torch.compile(lambda values: values.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # nearly anything, by what is absent
        raise UserError(
            f"--compile: torch.compile does not work on {device} ({_reason(error)}). It needs {NEEDS}: install "
            "them, or leave out --compile."
        ) from None


def compile_failure(error: BaseException) -> str | None:
    """A sentence, if this error came from torch.compile, else None."""
    from torch._dynamo.exc import TorchDynamoException

    kinds = (TorchDynamoException, subprocess.CalledProcessError)
    if not any(isinstance(cause, kinds) or "C compiler" in str(cause) for cause in _causes(error)):
        return None
    return (
        f"--compile: torch.compile failed ({_reason(error)}). It needs {NEEDS}; where these are installed, it cannot "
        "compile this model: leave out --compile."
    )


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error, then what it was raised from, down to the first one."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _reason(error: BaseException) -> str:
    """The line that a compiler marks as an error, else the first line of the first cause."""
    texts = [text for cause in _causes(error) for text in (*_outputs(cause), str(cause))]
    marked = [line for text in texts for line in text.splitlines() if "error: " in line]
    lines = marked or [line for text in reversed(texts) for line in text.splitlines() if line.strip()]
    return " ".join((lines or [type(error).__name__])[0].split())[:300]


def _outputs(error: BaseException) -> list[str]:
    """What a compiler printed, where the error holds it."""
    outputs = (getattr(error, "stderr", None), getattr(error, "output", None))
    return [text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in outputs if text]
