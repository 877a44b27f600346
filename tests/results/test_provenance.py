"""run.json: each start of a run, with what it was started, and the data it saw."""

import json
import subprocess

import pytest
import timm
import torch

from _normal import train as normal
from tests.conftest import ROOT, SMALL
from utils.results import provenance
from utils.runtime.errors import UserError
from utils.training.saver import Saver


@pytest.fixture
def command(image_folder, tmp_path):
    return [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path / "run"), "--epochs"]


def test_each_start_is_noted(command, image_folder, tmp_path):
    run = tmp_path / "run"
    normal.main([*command, "1"])
    first = json.loads((run / "run.json").read_text())
    assert first["data"]["train"] == {
        "root": str(image_folder / "train"), "images": {"bright": 12, "dark": 12, "striped": 12}
    }  # fmt: skip
    assert first["data"]["val"]["images"] == {"bright": 7, "dark": 7, "striped": 7}
    (start,) = first["starts"]
    assert start["command"].startswith("_normal/train.py --device cpu --model test_resnet")
    assert start["command"].endswith("--epochs 1")
    assert (start["epoch"], start["step"], start["processes"], start["device"]) == (0, 0, 1, "CPU")
    assert (start["versions"]["torch"], start["versions"]["timm"]) == (
        torch.__version__,
        timm.__version__,
    )

    again = ["--device", "cpu", "--data-path", str(image_folder), "--epochs", "2"]
    normal.main([*again, "--resume", str(run / "checkpoint.pth")])
    both = json.loads((run / "run.json").read_text())
    assert both["starts"][0] == start
    assert [one["epoch"] for one in both["starts"]] == [0, 1]
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:  # before its first checkpoint
        patch.setattr(Saver, "after_step", lambda *_: 1 / 0)
        normal.main([*command, "1", "--output-dir", str(tmp_path / "fails"), "--resume", "auto"])
    normal.main([*command, "1", "--output-dir", str(tmp_path / "fails"), "--resume", "auto"])
    assert len(json.loads((tmp_path / "fails" / "run.json").read_text())["starts"]) == 2
    # Taken along into another folder; a new run in its place would begin anew.
    normal.main([*again, "--resume", str(run / "checkpoint_prev.pth"), "--output-dir", str(tmp_path / "other")])
    assert [one["epoch"] for one in json.loads((tmp_path / "other" / "run.json").read_text())["starts"]] == [0, 1, 1]


def test_a_run_goes_on_with_the_very_images_it_began_with(image_folder, tmp_path):
    """Another list of as many images is refused; the same one under another name is as good."""
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


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"starts": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_said_and_passed_over(content, tmp_path, capsys):
    (tmp_path / "run.json").write_bytes(content)
    assert provenance.read_run(tmp_path) == {}
    assert f"{tmp_path / 'run.json'}: cannot be read" in capsys.readouterr().out


def test_nothing_is_said_where_there_is_none(tmp_path, capsys):
    assert provenance.read_run(tmp_path) == {}
    assert capsys.readouterr().out == ""


def test_the_commit_is_that_of_this_code_and_of_no_repository_around_it(tmp_path, monkeypatch):
    def git(*command):
        identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", "-C", tmp_path, *identity, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    code = tmp_path / "utils" / "provenance.py"
    code.parent.mkdir()
    code.write_text("")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(code))
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as a hook of another repository has it
    with monkeypatch.context() as without:
        without.delenv("GIT_DIR")
        git("init", "-q")
        (tmp_path / "other").write_text("")
        git("add", "other")
        git("commit", "-qm", "another project's")
        assert provenance._commit() is None
        git("add", code)
        git("commit", "-qm", "this code")
        commit = git("rev-parse", "--short=12", "HEAD")
    assert provenance._commit() == commit
    code.write_text("changed")
    assert provenance._commit() == f"{commit}+changes"
