"""--compile on a machine that cannot compile ends with one sentence."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from _normal import train as normal
from tests.conftest import ROOT, SMALL
from utils.runtime.errors import UserError
from utils.training import compiling

CPU = torch.device("cpu")


def inductor_error(inner: Exception) -> Exception:
    from torch._inductor.exc import InductorError

    error = InductorError(inner, None)
    error.__cause__ = inner
    return error


def no_python_headers() -> Exception:
    from torch._inductor.exc import CppCompileError

    return CppCompileError(["g++"], "/tmp/x.cpp:3:10: fatal error: Python.h: No such file or directory\nterminated.")


def no_compiler() -> Exception:
    from torch._inductor.exc import InvalidCxxCompiler

    return InvalidCxxCompiler()


ABSENT = {
    "a compiler": (lambda: inductor_error(no_compiler()), "No working C++ compiler found"),
    "headers": (lambda: inductor_error(no_python_headers()), "fatal error: Python.h: No such file or directory"),
    "headers for Triton": (
        lambda: subprocess.CalledProcessError(1, ["gcc"], stderr=b"main.c:5:10: fatal error: Python.h: No such file\n"),
        "fatal error: Python.h: No such file",
    ),
    "a compiler for Triton": (
        lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        "Failed to find C compiler.",
    ),
    "Triton": (lambda: inductor_error(RuntimeError("Cannot find a working triton installation.")), "working triton"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_absent_is_named_in_one_sentence(name, monkeypatch):
    make, reason = ABSENT[name]

    def fail(*_, **__):
        raise make()

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(UserError) as caught:
        compiling.check_compiler(CPU)
    for message in (str(caught.value), compiling.compile_failure(make())):
        assert message.startswith("--compile: torch.compile ")
        assert reason in message
        assert message.endswith("leave out --compile.")
        assert "\n" not in message


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError(), KeyError("module")])
def test_other_errors_are_not_taken_for_those_of_compilation(error):
    assert compiling.compile_failure(error) is None


def test_a_model_that_cannot_be_compiled_ends_before_the_first_epoch(image_folder, tmp_path, monkeypatch):
    def backend(*_):
        raise NotImplementedError("no kernel for this operator\nmore lines")

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compile_module(module, backend=backend))
    monkeypatch.setattr(normal, "check_compiler", lambda device: None)
    flags = [*SMALL, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(tmp_path), "--compile"]
    with pytest.raises(UserError, match=r"--compile: torch.compile failed \(no kernel for this operator\)") as caught:
        normal.main(flags)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.slow
def test_without_a_compiler_the_script_prints_one_sentence(image_folder, tmp_path):
    hidden = {"CXX": "/nonexistent", "CC": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path / "run"), "--compile"]
    command = [sys.executable, str(ROOT / "_normal" / "train.py"), *flags]
    ended = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(
        "error: --compile: torch.compile does not work on cpu (No working C++ compiler found"
    )
    assert not (tmp_path / "run").exists()
