"""--compile reaches each network, and ends with one sentence on a machine that cannot compile."""

import subprocess

import pytest
import torch
from torch import nn
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.training import compiling

CPU = torch.device("cpu")
NO_HEADERS = "/tmp/x.cpp:3:10: fatal error: Python.h: No such file or directory\nterminated."


def inductor_error(cause: Exception) -> Exception:
    error = InductorError(cause, None)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (inductor_error(InvalidCxxCompiler()), "No working C++ compiler found"),
        (inductor_error(CppCompileError(["g++"], NO_HEADERS)), "fatal error: Python.h: No such file or directory"),
        (subprocess.CalledProcessError(1, ["gcc"], stderr=NO_HEADERS.encode()), "fatal error: Python.h: No such file"),
        (RuntimeError("Failed to find C compiler. Please specify via CC."), "Failed to find C compiler."),
        (inductor_error(RuntimeError("Cannot find a working triton installation.")), "working triton"),
    ],
    ids=["compiler", "headers", "headers for Triton", "compiler for Triton", "Triton"],
)
def test_one_sentence_names_what_is_missing(error, reason, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(UserError) as caught:
        compiling.check_compiler(CPU)
    for message in (str(caught.value), compiling.compile_failure(error)):
        assert message.startswith("--compile: torch.compile ")
        assert reason in message
        assert message.endswith("leave out --compile.")
        assert "\n" not in message


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError(), KeyError("module")])
def test_other_errors_are_not_reported_as_compile_failures(error):
    assert compiling.compile_failure(error) is None


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_ends_the_run_early(image_folder, tmp_path, monkeypatch):
    def backend(*_):
        raise NotImplementedError("no kernel for this operator\nmore lines")

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compile_module(module, backend=backend))
    monkeypatch.setattr("utils.training.run.check_compiler", lambda device: None)
    flags = [*SMALL, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(tmp_path), "--compile"]
    with pytest.raises(UserError, match=r"--compile: torch.compile failed \(no kernel for this operator\)") as caught:
        normal.main(flags)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.slow
def test_without_a_compiler_the_script_prints_one_sentence(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    flags = [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path / "run"), "--compile"]
    with torch._inductor.config.patch({"cpp.cxx": ("/nonexistent",)}), pytest.raises(SystemExit) as caught:
        run_script(lambda: normal.main(flags))
    assert caught.value.code == 2
    message = "error: --compile: torch.compile does not work on cpu (No working C++ compiler found"
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compile_reaches_each_network(train, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, mode: compiled.append((type(module).__name__, mode)))
    train(normal, "--epochs", 1, "--compile", name="normal")
    train(policy_gradient, "--epochs", 1, "--compile", name="policy")
    assert compiled == [("ResNet", None), ("ResNet", None), ("ConcentrationNetwork", None)]
    compiling.compile_in_place(torch.nn.Linear(1, 1), torch.device("cuda"))
    assert compiled[-1] == ("Linear", "reduce-overhead")  # with CUDA graphs
