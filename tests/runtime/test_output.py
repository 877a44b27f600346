"""Output that nobody receives: a closed pipe or stream, a full disk, a lost terminal. No run ends by it."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from _normal import train as normal
from benchmarks.soak import Tally
from tests.conftest import ROOT, SMALL
from tests.helpers.disks import full_disk
from tests.helpers.ranks import PATIENCE
from utils import predict
from utils.runtime import output
from utils.runtime.errors import UserError

EPOCHS = 1
FLAGS = [*SMALL, "--epochs", str(EPOCHS), "--print-freq", "1"]


def start(command: list[str], **streams: object) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}, **streams
    )


def closed_streams(command: list[str]) -> subprocess.Popen:
    return start(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command])


def full_device(command: list[str]) -> subprocess.Popen:
    with open("/dev/full", "wb") as full:
        return start(command, stdout=full, stderr=full)


def closed_pipe(command: list[str]) -> subprocess.Popen:
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline()  # as `| head -n 1` does
    process.stdout.close()
    return process


def lost_terminal(command: list[str]) -> subprocess.Popen:
    terminal, end = os.openpty()
    process = start(command, stdout=end, stderr=end)
    os.close(end)
    assert os.read(terminal, 1)
    os.close(terminal)
    return process


@pytest.mark.slow
def test_a_training_whose_output_is_lost_computes_the_same(image_folder, tmp_path):
    command = [sys.executable, "_normal/train.py", *FLAGS, "--data-path", str(image_folder), "--output-dir"]
    kinds = (closed_streams, full_device, closed_pipe, lost_terminal)
    processes = {kind.__name__: kind([*command, str(tmp_path / kind.__name__)]) for kind in kinds}
    normal.main([*command[2:], str(tmp_path / "whole")])
    tally = Tally()
    for name, process in processes.items():
        assert process.wait(PATIENCE) == 0, name
        tally.compare(tmp_path / "whole", tmp_path / name)
    assert tally.differences == []
    assert tally.files == len(kinds) * (EPOCHS + 3)


def test_an_error_keeps_its_exit_code_when_its_sentence_is_lost(tmp_path):
    command = [sys.executable, "_normal/train.py", "--data-path", str(tmp_path / "absent")]
    assert full_device(command).wait(PATIENCE) == 2


@pytest.fixture
def own_stdout(monkeypatch) -> Callable[[int], io.TextIOWrapper]:
    """own_stdout(descriptor): the process's stdout, opened on another descriptor as Python opens it."""

    def open_stdout(descriptor: int, **settings: object) -> io.TextIOWrapper:
        stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w")), encoding="utf-8", **settings)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        return stream

    return open_stdout


def test_a_log_file_goes_on_once_its_disk_has_room_again(own_stdout, tmp_path):
    own_stdout(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT))
    output.drop_lost_output("stdout")
    print("before", flush=True)
    with full_disk(3):
        print("lost", flush=True)
        print("also" * 10_000, flush=True)
    print("after", flush=True)
    assert (tmp_path / "log").read_text() == "before\nafter\n"


def test_the_stream_is_otherwise_the_one_that_python_opened(own_stdout, tmp_path):
    before = own_stdout(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), errors="surrogateescape", newline="\n")
    output.drop_lost_output("stdout")
    now = sys.stdout
    assert now is not before
    assert (now.fileno(), now.isatty(), now.encoding, now.errors) == (
        before.fileno(),
        False,
        "utf-8",
        "surrogateescape",
    )
    now.reconfigure(errors="backslashreplace", line_buffering=True)
    print("\udce9é\r")
    assert now.buffer.write(b"\xff") == 1
    now.flush()
    assert (tmp_path / "log").read_bytes() == b"\\udce9\xc3\xa9\r\n\xff"
    output.drop_lost_output("stdout")
    assert sys.stdout is now


def test_unbuffered_output_stays_unbuffered(own_stdout, tmp_path):
    own_stdout(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), write_through=True)
    output.drop_lost_output("stdout")
    sys.stdout.write("at once")
    assert (tmp_path / "log").read_text() == "at once"


def test_streams_of_a_notebook_or_a_test_stay_as_they_are(monkeypatch):
    other = io.StringIO()
    monkeypatch.setattr(sys, "stderr", other)
    output.drop_lost_output("stdout", "stderr")
    assert sys.stderr is other


def lines(count: int) -> list[str]:
    return ["a line\n"] * count


def test_predictions_end_at_a_closed_pipe(own_stdout):
    read, write = os.pipe()
    os.close(read)
    own_stdout(write)
    with pytest.raises(SystemExit) as end:
        predict.write_lines(iter(lines(10_000)), None)
    assert end.value.code == 128 + signal.SIGPIPE


def test_predictions_that_cannot_be_written_are_an_error(own_stdout):
    own_stdout(os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(UserError, match=r"stdout: cannot be written \(No space left on device\)"):
        predict.write_lines(iter(lines(1)), None)


def test_an_error_in_predicting_is_not_taken_for_lost_output(own_stdout, tmp_path):
    def failing():
        yield "a line\n"
        raise PermissionError("an image")

    own_stdout(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT))
    with pytest.raises(PermissionError, match="an image"):
        predict.write_lines(failing(), None)


def test_only_a_command_that_prints_its_result_fails_when_stdout_is_full():
    code = "from utils.runtime.processes import run_script; run_script(lambda: print('a result'), prints_result={})"
    processes = [full_device([sys.executable, "-c", code.format(prints)]) for prints in (False, True)]
    assert [process.wait(PATIENCE) for process in processes] == [0, 120]  # 120: Python's own, at its exit
