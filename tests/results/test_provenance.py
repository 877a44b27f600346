"""run.json: the start of each run with its command, and the data it saw."""

import json
import subprocess

import pytest
import timm
import torch

from _normal import train as normal
from tests.conftest import ROOT, SMALL
from utils.results import provenance
from utils.results.git import commit_of
from utils.runtime.errors import UserError
from utils.training.saver import Saver


@pytest.fixture
def command(image_folder, tmp_path):
    return [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path / "run"), "--epochs"]


def starts_of(folder):
    return json.loads((folder / "run.json").read_text())["starts"]


@pytest.mark.slow
def test_each_start_of_a_run_is_recorded(command, image_folder, tmp_path):
    run = tmp_path / "run"
    normal.main([*command, "1"])
    data = json.loads((run / "run.json").read_text())["data"]
    assert data["train"] == {"root": f"{image_folder}/train", "images": {"bright": 12, "dark": 12, "striped": 12}}
    assert data["val"]["images"] == {"bright": 7, "dark": 7, "striped": 7}
    (start,) = starts_of(run)
    assert start["command"].startswith("_normal/train.py --device cpu --model test_resnet")
    assert start["command"].endswith("--epochs 1")
    assert (start["epoch"], start["step"], start["processes"], start["device"]) == (0, 0, 1, "CPU")
    assert (start["versions"]["torch"], start["versions"]["timm"]) == (torch.__version__, timm.__version__)

    again = ["--device", "cpu", "--data-path", str(image_folder), "--epochs", "2"]
    normal.main([*again, "--resume", str(run / "checkpoint.pth")])
    assert starts_of(run)[0] == start
    assert [start["epoch"] for start in starts_of(run)] == [0, 1]
    # Resumed in another folder, the run keeps its earlier starts.
    normal.main([*again, "--resume", str(run / "checkpoint_prev.pth"), "--output-dir", str(tmp_path / "other")])
    assert [start["epoch"] for start in starts_of(tmp_path / "other")] == [0, 1, 1]


def test_a_start_that_failed_before_its_first_checkpoint_is_kept(command, tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
        patch.setattr(Saver, "after_step", lambda *_: 1 / 0)
        normal.main([*command, "1", "--resume", "auto"])
    normal.main([*command, "1", "--resume", "auto"])
    assert len(starts_of(tmp_path / "run")) == 2


def test_a_run_resumes_only_with_the_images_it_began_with(image_folder, tmp_path):
    """Another list of as many images is refused; the same list in another file is accepted."""
    listed, run = tmp_path / "list.txt", tmp_path / "run"
    listed.write_text("train/dark/1.png\nval/dark/2.png\n")
    command = [*SMALL, "--data-path", str(image_folder), "--exclude", str(listed), "--output-dir", str(run), "--epochs"]
    normal.main([*command, "1"])
    assert json.loads((run / "run.json").read_text())["data"]["val"]["images"]["dark"] == 6
    for line, split in (("train/dark/3.png\nval/dark/2.png", "train"), ("train/dark/1.png\nval/bright/2.png", "val")):
        listed.write_text(line)
        with pytest.raises(UserError, match=f"the run started with other images in {split} than the data has now"):
            normal.main([*command, "2", "--resume", "auto"])
    moved = tmp_path / "moved.txt"
    moved.write_text("# the same\nval/dark/2.png\ntrain/dark/1.png\n")
    normal.main([*command, "2", "--resume", "auto", "--exclude", str(moved)])
    assert len((run / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("content", [b"{", b'{"starts": 1}', None])
def test_a_damaged_file_is_ignored_with_a_message(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    assert provenance.read_starts(tmp_path) == []
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'run.json'}: cannot be read" in printed if content else printed == ""


def test_the_commit_is_of_this_code_not_of_a_repository_around_it(tmp_path, monkeypatch):
    def git(*command):
        identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        command = ["git", "-C", tmp_path, *identity, *command]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook of another repository
    code, other = tmp_path / "utils" / "code.py", tmp_path / "other"
    code.parent.mkdir()
    for file in (code, other):
        file.write_text("")
    git("init", "-q")
    git("add", "other")
    git("commit", "-qm", "another project's")
    assert commit_of(code) is None
    git("add", code)
    git("commit", "-qm", "this code")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert commit_of(code) == commit
    code.write_text("changed")
    assert commit_of(code) == f"{commit}+changes"
