"""A resumed run prints which paths it takes from its file."""

from pathlib import Path

import pytest
import torch

from _normal import train as normal
from _policy_gradient import gallery
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY
from utils import arguments
from utils.checkpoints import checkpoint
from utils.training import start


@pytest.fixture(scope="module")
def folder(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    normal.main([*SMALL, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(folder)])
    return folder


def with_args(folder: Path, path: Path, **args: object) -> Path:
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    checkpoint.save(path, {**state, "args": state["args"] | args})
    return path


def printed_on_resume(path: Path, capsys, *flags: str) -> str:
    parser = normal.build_parser()
    capsys.readouterr()
    start.choose_start(parser, arguments.parse_given(parser, ["--resume", str(path), *flags]), "_normal")
    return capsys.readouterr().out


def test_the_paths_that_a_resume_takes_from_its_file_are_printed(folder, image_folder, tmp_path, capsys):
    path = with_args(folder, tmp_path / "copy.pth", exclude="/there/list.txt", cache_dir="/there/cache")
    taken = f"--data-path {image_folder} --exclude /there/list.txt --cache-dir /there/cache"
    for flags in ((), ("--output-dir", str(tmp_path / "elsewhere"))):
        assert printed_on_resume(path, capsys, *flags) == f"{path}: paths taken from this file: {taken}\n"
    given = ("--data-path", "mine", "--cache-dir", "mine")
    assert printed_on_resume(path, capsys, *given) == f"{path}: paths taken from this file: --exclude /there/list.txt\n"
    assert printed_on_resume(path, capsys, *given, "--exclude", "mine") == ""


def test_a_resume_that_takes_no_path_prints_none(folder, tmp_path, capsys):
    path = with_args(folder, tmp_path / "copy.pth", data_path=None)
    assert printed_on_resume(path, capsys) == ""


def test_control_characters_in_a_path_of_the_file_are_escaped(folder, tmp_path, capsys):
    path = with_args(folder, tmp_path / "evil.pth", data_path="/data\x1b[2J\r\nall is well", exclude="/x\x07\u202e")
    line = r"--data-path /data\x1b[2J\r\nall is well --exclude /x\x07\u202e"
    assert printed_on_resume(path, capsys) == f"{path}: paths taken from this file: {line}\n"


def test_the_gallery_prints_on_stderr_the_paths_that_it_reads(image_folder, tmp_path, capsys):
    flags = [*SMALL_POLICY, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(tmp_path)]
    flags += ["--cache-dataset", "host", "--cache-dir", str(tmp_path / "cache")]  # which the gallery does not read
    policy_gradient.main(flags)
    capsys.readouterr()
    gallery.read_run(tmp_path / "checkpoint.pth", None, "val")
    captured = capsys.readouterr()
    assert captured.out == ""
    expected = f"{tmp_path / 'checkpoint.pth'}: paths taken from this file: --data-path {image_folder}\n"
    assert captured.err == expected
