"""The average of several files of weights: by hand, with its integers whole, and never over another file."""

import sys
from pathlib import Path

import pytest
import torch

from tests.test_checkpoint import CLASSES, assert_equal_states, network
from utils import checkpoint, weight_averaging
from utils.checkpoint import (
    read_weights,
    save,
    weights_state,
)
from utils.errors import UserError


def write_weights(path: Path, *, classes: list[str] = CLASSES, **tensors: torch.Tensor) -> str:
    save(path, {"format_version": checkpoint.FORMAT_VERSION, "model": tensors, "classes": classes, "args": {"lr": 0.1}})
    return str(path)


def average_files(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["weight_averaging", *map(str, arguments)])
    weight_averaging.main()


def test_average_by_hand(tmp_path, monkeypatch, capsys):
    files = [
        write_weights(
            tmp_path / f"model_{number}.pth",
            weight=torch.tensor([value, 2.0**24 if number == 0 else 1.0]),
            half=torch.tensor([value]).half(),
            counter=torch.tensor(number + 10),
        )
        for number, value in enumerate((1.0, 2.0, 6.0))
    ]
    average_files(monkeypatch, *files, "-o", tmp_path / "average.pth")
    found = read_weights(tmp_path / "average.pth")
    expected = {
        "weight": torch.tensor([3.0, 5592406.0]),  # (2^24 + 2) / 3, which float32 sums would miss
        "half": torch.tensor([3.0]).half(),
        "counter": torch.tensor(12),  # the last, still an integer
    }
    assert_equal_states(found.model, expected)
    assert (found.classes, found.args) == (CLASSES, {"lr": 0.1})
    assert "the average of 3 files" in capsys.readouterr().out


def test_average_of_models_loads_into_the_model(tmp_path, monkeypatch):
    for seed in range(3):
        save(tmp_path / f"model_{seed}.pth", weights_state(network(seed), CLASSES, {}))
    names = [tmp_path / f"model_{seed}.pth" for seed in range(3)]
    average_files(monkeypatch, *names, "-o", tmp_path / "average.pth")
    model = network(9)
    model.load_state_dict(read_weights(tmp_path / "average.pth").model)
    states = [network(seed).state_dict() for seed in range(3)]
    for key in ("0.weight", "1.running_var", "2.bias"):
        torch.testing.assert_close(model.state_dict()[key], (states[0][key] + states[1][key] + states[2][key]) / 3)
    assert model[1].num_batches_tracked.item() == 1


def test_an_average_of_one_file_is_that_file(tmp_path, monkeypatch):
    save(tmp_path / "model_0.pth", weights_state(network(), CLASSES, {}))
    average_files(monkeypatch, tmp_path / "model_0.pth", "-o", tmp_path / "average.pth")
    assert_equal_states(read_weights(tmp_path / "average.pth").model, network().state_dict())


@pytest.mark.parametrize(
    "other",
    [
        {"weight": torch.zeros(3), "bias": torch.zeros(1)},
        {"weight": torch.zeros(2)},
        {"weight": torch.zeros(2), "bias": torch.zeros(1), "scale": torch.zeros(1)},
    ],
    ids=["another shape", "a missing key", "a key more"],
)
def test_files_of_different_models_are_not_averaged(tmp_path, monkeypatch, other):
    first = write_weights(tmp_path / "first.pth", weight=torch.zeros(2), bias=torch.zeros(1))
    second = write_weights(tmp_path / "second.pth", **other)
    with pytest.raises(UserError) as caught:
        average_files(monkeypatch, first, second, "-o", tmp_path / "average.pth")
    assert str(caught.value).startswith(f"{second}: does not fit {first}: ")
    assert not (tmp_path / "average.pth").exists()


def test_files_of_different_classes_are_not_averaged(tmp_path, monkeypatch):
    first = write_weights(tmp_path / "first.pth", weight=torch.zeros(2))
    second = write_weights(tmp_path / "second.pth", weight=torch.zeros(2), classes=["dark", "bright"])
    with pytest.raises(UserError, match="was trained on other classes"):
        average_files(monkeypatch, first, second, "-o", tmp_path / "average.pth")


def test_an_average_of_files_that_name_no_classes_can_be_read(tmp_path, monkeypatch):
    for number, value in enumerate((1.0, 3.0)):
        torch.save({"model": {"a": torch.tensor([value])}, "args": {"model": "small"}}, tmp_path / f"{number}.pth")
    average_files(monkeypatch, tmp_path / "0.pth", tmp_path / "1.pth", "-o", tmp_path / "average.pth")
    found = read_weights(tmp_path / "average.pth")
    assert torch.equal(found.model["a"], torch.tensor([2.0]))
    assert (found.classes, found.args) == (None, {"model": "small"})


def test_an_average_is_not_written_over_a_file(tmp_path, monkeypatch):
    source = write_weights(tmp_path / "model_0.pth", weight=torch.ones(2))
    output = tmp_path / "average.pth"
    output.write_text("precious")
    with pytest.raises(UserError) as caught:
        average_files(monkeypatch, source, "-o", output)
    assert str(caught.value).startswith(f"{output}: is there already")
    assert output.read_text() == "precious"
    average_files(monkeypatch, source, "-o", output, "--overwrite")
    assert torch.equal(read_weights(output).model["weight"], torch.ones(2))


def test_an_average_needs_its_folder_and_its_files(tmp_path, monkeypatch):
    source = write_weights(tmp_path / "model_0.pth", weight=torch.ones(2))
    with pytest.raises(UserError, match="absent: no such folder"):
        average_files(monkeypatch, source, "-o", tmp_path / "absent" / "average.pth")
    with pytest.raises(UserError, match=r"model_1\.pth: no such file"):
        average_files(monkeypatch, source, tmp_path / "model_1.pth", "-o", tmp_path / "average.pth")


def test_a_file_given_twice_does_not_count_twice(tmp_path, monkeypatch):
    source = write_weights(tmp_path / "model_0.pth", weight=torch.ones(2))
    link = tmp_path / "latest.pth"
    link.symlink_to("model_0.pth")
    for again in (source, link):
        with pytest.raises(UserError) as caught:
            average_files(monkeypatch, source, again, "-o", tmp_path / "average.pth")
        assert str(caught.value) == f"{again}: is given twice; give each file once."
    assert not (tmp_path / "average.pth").exists()
