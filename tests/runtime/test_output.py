"""Output that nobody receives (a closed pipe or stream, a full disk, a lost terminal) does not end a run."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from _normal import train as normal
from benchmarks.soak import Tally
from tests.conftest import ROOT, SMALL
from tests.helpers.disks import full_disk
from tests.helpers.ranks import PATIENCE, start_process
from utils import predict
from utils.runtime import output
from utils.runtime.errors import UserError

FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def flags(image_folder):
    return [*SMALL, "--epochs", "1", "--print-freq", "1", "--data-path", str(image_folder), "--output-dir"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a training whose output arrives."""
    folder = tmp_path_factory.mktemp("whole")
    normal.main([*flags, str(folder)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["closed streams", "full disk", "closed pipe", "lost terminal"])
def test_a_training_whose_output_is_lost_computes_the_same(flags, whole, tmp_path, kind):
    reader, path = None, {"closed streams": None, "full disk": FULL}.get(kind, tmp_path / "pipe")
    if kind == "closed pipe":
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(reader, True)
    elif kind == "lost terminal":
        reader, terminal = os.openpty()
        path = Path(os.ttyname(terminal))
    process = start_process("_normal/train.py", [*flags, str(tmp_path / "lost")], path, path)
    if reader is not None:
        while not os.read(reader, 1):  # a pipe that the process has not opened yet
            pass
        os.close(reader)
    process.join(PATIENCE)
    assert process.exitcode == 0
    tally = Tally()
    tally.compare(whole, tmp_path / "lost")
    assert tally.differences == []
    assert tally.files == 4


@pytest.mark.slow
def test_an_error_keeps_its_exit_code_when_its_message_is_lost(tmp_path):
    process = start_process("_normal/train.py", ["--data-path", str(tmp_path / "absent")], FULL, FULL)
    process.join(PATIENCE)
    assert process.exitcode == 2


@pytest.fixture
def own_stdout(monkeypatch) -> Callable[[int], io.TextIOWrapper]:
    """own_stdout(descriptor): replaces the process's stdout by a stream on this descriptor, as Python opens it."""

    def open_stdout(descriptor: int, **settings: object) -> io.TextIOWrapper:
        stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w")), encoding="utf-8", **settings)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        return stream

    return open_stdout


def test_a_log_file_continues_once_its_disk_has_room_again(own_stdout, tmp_path):
    own_stdout(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT))
    output.drop_lost_output("stdout")
    print("before", flush=True)
    with full_disk(3):
        print("lost", flush=True)
        print("also" * 10_000, flush=True)
    print("after", flush=True)
    assert (tmp_path / "log").read_text() == "before\nafter\n"


def test_a_lossy_stream_keeps_the_settings_of_the_original(own_stdout, tmp_path):
    before = own_stdout(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), errors="surrogateescape", newline="\n")
    output.drop_lost_output("stdout")
    now = sys.stdout
    assert now is not before
    assert now.fileno() == before.fileno()
    assert (now.isatty(), now.encoding, now.errors) == (False, "utf-8", "surrogateescape")
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


def test_streams_of_a_notebook_stay_unchanged(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    output.drop_lost_output("stderr")
    assert sys.stderr is stream


def test_predictions_end_at_a_closed_pipe(own_stdout):
    read, write = os.pipe()
    os.close(read)
    own_stdout(write)
    with pytest.raises(SystemExit) as end:
        predict.write_lines(iter(["a line\n"] * 10_000), None)
    assert end.value.code == 128 + signal.SIGPIPE


def test_predictions_that_cannot_be_written_are_an_error(own_stdout):
    own_stdout(os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(UserError, match=r"stdout: cannot be written \(No space left on device\)"):
        predict.write_lines(iter(["a line\n"]), None)


def test_an_error_in_predicting_is_not_mistaken_for_lost_output(own_stdout, tmp_path):
    def failing():
        yield "a line\n"
        raise PermissionError("an image")

    own_stdout(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT))
    with pytest.raises(PermissionError, match="an image"):
        predict.write_lines(failing(), None)


@pytest.mark.slow
def test_only_a_command_that_prints_its_result_fails_when_stdout_is_full():
    code = "from utils.runtime.processes import run_script; run_script(lambda: print('a result'), prints_result={})"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    with FULL.open("wb") as full:
        for prints, exit_code in ((False, 0), (True, 120)):  # 120: Python's own, at its exit
            command = [sys.executable, "-c", code.format(prints)]
            assert subprocess.run(command, cwd=ROOT, env=buffered, stdout=full, stderr=full).returncode == exit_code
