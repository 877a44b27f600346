"""The average of several files of weights: by hand, with its integers whole, and never over another file."""

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.states import CLASSES, assert_equal_states, network
from utils import weight_averaging
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import (
    read_weights,
    save,
    weights_state,
)
from utils.runtime.errors import UserError


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
    assert str(caught.value).startswith(f"{output}: already exists; give another --output, or --overwrite.")
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


def files_of_a_run(folder: Path, epochs: int = 12, best: int = 2, **args: object) -> list[str]:
    """model_0.pth, ..., model_best.pth, checkpoint.pth and checkpoint_prev.pth of a run, in a shell's order."""
    for epoch in range(epochs):
        save(folder / f"model_{epoch}.pth", weights_state(network(epoch), CLASSES, {"model": "small", **args}))
    save(folder / "model_best.pth", weights_state(network(best), CLASSES, {"model": "small", **args}))
    for name, epoch in (("checkpoint.pth", epochs - 1), ("checkpoint_prev.pth", epochs - 2)):
        state = weights_state(network(epoch), CLASSES, {"model": "small", **args})
        save(folder / name, {**state, "optimizers": {"classifier": {}}})
    return sorted(map(str, folder.glob("*.pth")))


def refused(monkeypatch, *files: object) -> str:
    output = Path(files[0]).parent / "refused.pth"
    with pytest.raises(UserError) as caught:
        average_files(monkeypatch, *files, "-o", output)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_files_of_a_folder_are_no_average(tmp_path, monkeypatch):
    message = refused(monkeypatch, *files_of_a_run(tmp_path))
    assert message == (
        f"{tmp_path}/checkpoint.pth is the state of a run that goes on, not the weights of an epoch; "
        f"{tmp_path}/checkpoint_prev.pth is the state of a run that goes on, not the weights of an epoch; "
        f"{tmp_path}/model_best.pth holds the same weights as {tmp_path}/model_2.pth. "
        f"Give the last epochs' weights only: {tmp_path}/model_9.pth {tmp_path}/model_10.pth {tmp_path}/model_11.pth"
    )
    average_files(monkeypatch, *message.split("only: ")[1].split(), "-o", tmp_path / "average.pth")


def test_a_full_state_among_weights_is_recognised_under_any_name(tmp_path, monkeypatch):
    files_of_a_run(tmp_path, 3)
    (tmp_path / "checkpoint.pth").rename(tmp_path / "model_3.pth")
    message = refused(monkeypatch, tmp_path / "model_1.pth", tmp_path / "model_3.pth")
    assert message.startswith(f"{tmp_path}/model_3.pth is the state of a run")
    states = [tmp_path / "model_3.pth", tmp_path / "checkpoint_prev.pth"]  # no mixture
    average_files(monkeypatch, *states, "-o", tmp_path / "average.pth")


def test_the_best_weights_count_twice_only_beside_their_own_epoch(tmp_path, monkeypatch):
    files_of_a_run(tmp_path, 3, best=1)
    best, copy = tmp_path / "model_best.pth", tmp_path / "copy.pth"
    average_files(monkeypatch, tmp_path / "model_0.pth", best, "-o", tmp_path / "average.pth")
    copy.write_bytes(best.read_bytes())
    for first, second in ((best, tmp_path / "model_1.pth"), (tmp_path / "model_1.pth", best)):
        assert refused(monkeypatch, first, second).startswith(
            f"{best} holds the same weights as {tmp_path}/model_1.pth."
        )
    assert "holds the same weights as" in refused(monkeypatch, copy, best)


@pytest.mark.parametrize(
    ("one", "other", "match"),
    [
        (
            {"train_crop_size": 32},
            {"train_crop_size": 64},
            "b.pth: was made with --train-crop-size 64, and .*a.pth with",
        ),
        ({"mean": [0.3]}, {"mean": [0.5]}, "b.pth: was made with --mean 0.5, and .*a.pth with --mean 0.3; average the"),
        ({"gray": True}, {"gray": False}, "b.pth: was made with --no-gray, and .*a.pth with --gray;"),
        ({"grid": 8, "mask_policy": "learned"}, {}, "a.pth: was trained with masks, and .*b.pth without"),
        ({"finetune": "hot.pth"}, {"grid": 8, "mask_policy": "uniform"}, "b.pth: was trained with masks, and .*a.pth"),
        ({"grid": 8}, {"grid": 16}, "b.pth: was made with --grid 16, and .*a.pth with --grid 8"),
    ],
)
def test_files_of_different_runs_are_not_averaged(one, other, match, tmp_path, monkeypatch):
    for seed, (name, args) in enumerate((("a.pth", one), ("b.pth", other))):
        save(tmp_path / name, weights_state(network(seed), CLASSES, {"model": "small", **args}))
    assert re.search(match, refused(monkeypatch, tmp_path / "a.pth", tmp_path / "b.pth"))


def test_runs_that_differ_in_other_flags_can_be_averaged(tmp_path, monkeypatch):
    for seed, args in enumerate(
        ({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 1, "gray": False}, {"finetune": "hot.pth"})
    ):
        save(tmp_path / f"{seed}.pth", weights_state(network(seed), CLASSES, {"model": "small", **args}))
    average_files(monkeypatch, *(tmp_path / f"{seed}.pth" for seed in range(3)), "-o", tmp_path / "average.pth")
    assert len(read_weights(tmp_path / "average.pth").model) == len(network().state_dict())
