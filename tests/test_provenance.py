"""run.json: each start of a run, with what it was started, and the data it saw."""

import json

import pytest
import timm
import torch

from _normal import train as normal
from tests.conftest import SMALL
from utils import provenance


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
        torch.__version__.split("+")[0],
        timm.__version__,
    )

    again = ["--device", "cpu", "--data-path", str(image_folder), "--epochs", "2"]
    normal.main([*again, "--resume", str(run / "checkpoint.pth")])
    both = json.loads((run / "run.json").read_text())
    assert both["starts"][0] == start
    assert [one["epoch"] for one in both["starts"]] == [0, 1]
    # Taken along into another folder; a new run in its place would begin anew.
    normal.main([*again, "--resume", str(run / "checkpoint_prev.pth"), "--output-dir", str(tmp_path / "other")])
    assert [one["epoch"] for one in json.loads((tmp_path / "other" / "run.json").read_text())["starts"]] == [0, 1, 1]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"starts": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_said_and_passed_over(content, tmp_path, capsys):
    (tmp_path / "run.json").write_bytes(content)
    assert provenance.read_run(tmp_path) == {}
    assert f"{tmp_path / 'run.json'}: cannot be read" in capsys.readouterr().out


def test_nothing_is_said_where_there_is_none(tmp_path, capsys):
    assert provenance.read_run(tmp_path) == {}
    assert capsys.readouterr().out == ""


def test_the_commit_is_none_outside_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance._commit() is None
