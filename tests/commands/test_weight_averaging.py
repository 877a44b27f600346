"""utils.weight_averaging: exact means, files of one run only, no overwriting unless asked."""

import re
from pathlib import Path

import pytest
import torch

from tests.helpers.states import CLASSES, assert_equal_states, network
from utils import weight_averaging
from utils.checkpoints.checkpoint import FORMAT_VERSION, read_weights, save, weights_state
from utils.runtime.errors import UserError


def write_weights(path: Path, *, classes: list[str] = CLASSES, **tensors: torch.Tensor) -> Path:
    save(path, {"format_version": FORMAT_VERSION, "model": tensors, "classes": classes, "args": {"lr": 0.1}})
    return path


def write_network(path: Path, seed: int = 0, /, **args: object) -> Path:
    save(path, weights_state(network(seed), CLASSES, {"model": "small", **args}))
    return path


def average(*files: Path, name: str = "average.pth") -> Path:
    """Average into a file in the first file's folder."""
    output = files[0].parent / name
    weight_averaging.main([*map(str, files), "-o", str(output)])
    return output


def refused(*files: Path) -> str:
    """The message of the error; checks that nothing is written."""
    with pytest.raises(UserError) as caught:
        average(*files, name="refused.pth")
    assert not (files[0].parent / "refused.pth").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The mean


def test_average_by_hand(tmp_path, capsys):
    files = [
        write_weights(
            tmp_path / f"model_{number}.pth",
            weight=torch.tensor([value, 2.0**24 if number == 0 else 1.0]),
            half=torch.tensor([value]).half(),
            counter=torch.tensor(number + 10),
        )
        for number, value in enumerate((1.0, 2.0, 6.0))
    ]
    weights = read_weights(average(*files))
    expected = {
        "weight": torch.tensor([3.0, 5592406.0]),  # (2^24 + 2) / 3; float32 sums would lose the 2
        "half": torch.tensor([3.0]).half(),
        "counter": torch.tensor(12),  # the last one, still an integer
    }
    assert_equal_states(weights.model, expected)
    assert (weights.classes, weights.args) == (CLASSES, {"lr": 0.1})
    assert "the average of 3 files" in capsys.readouterr().out


def test_an_average_of_files_without_class_names_can_be_read(tmp_path):
    files = [tmp_path / "0.pth", tmp_path / "1.pth"]
    for path, value in zip(files, (1.0, 3.0), strict=True):
        torch.save({"model": {"a": torch.tensor([value])}, "args": {"model": "small"}}, path)
    weights = read_weights(average(*files))
    assert torch.equal(weights.model["a"], torch.tensor([2.0]))
    assert (weights.classes, weights.args) == (None, {"model": "small"})


# The output and the list of files


def test_an_existing_file_is_replaced_only_with_overwrite(tmp_path):
    source = write_network(tmp_path / "model_0.pth")
    output = tmp_path / "average.pth"
    output.write_text("precious")
    with pytest.raises(UserError) as caught:
        average(source)
    assert str(caught.value) == f"{output}: already exists; give another --output, or --overwrite."
    assert output.read_text() == "precious"
    weight_averaging.main([str(source), "-o", str(output), "--overwrite"])
    assert_equal_states(read_weights(output).model, network().state_dict())


def test_a_missing_folder_is_made_and_a_missing_file_is_an_error(tmp_path):
    source = write_weights(tmp_path / "model_0.pth", weight=torch.ones(2))
    average(source, name="new/folder/average.pth")
    assert torch.equal(read_weights(tmp_path / "new" / "folder" / "average.pth").model["weight"], torch.ones(2))
    with pytest.raises(UserError, match=r"model_0\.pth/folder: cannot be created \(Not a directory\)"):
        average(source, name="model_0.pth/folder/average.pth")
    with pytest.raises(UserError, match=r"model_1\.pth: no such file"):
        average(source, tmp_path / "model_1.pth")


def test_a_file_given_twice_is_an_error(tmp_path):
    source = write_weights(tmp_path / "model_0.pth", weight=torch.ones(2))
    link = tmp_path / "latest.pth"
    link.symlink_to("model_0.pth")
    for path in (source, link):
        assert refused(source, path) == f"{path}: is given twice; give each file once."


# Files that do not belong together


@pytest.mark.parametrize(
    ("tensors", "classes"),
    [
        ({"weight": torch.zeros(3), "bias": torch.zeros(1)}, CLASSES),
        ({"weight": torch.zeros(2)}, CLASSES),
        ({"weight": torch.zeros(2), "bias": torch.zeros(1), "scale": torch.zeros(1)}, CLASSES),
        ({"weight": torch.zeros(2), "bias": torch.zeros(1)}, CLASSES[::-1]),
    ],
    ids=["another shape", "a missing key", "an additional key", "other classes"],
)
def test_files_of_different_models_are_not_averaged(tensors, classes, tmp_path):
    first = write_weights(tmp_path / "first.pth", weight=torch.zeros(2), bias=torch.zeros(1))
    second = write_weights(tmp_path / "second.pth", classes=classes, **tensors)
    problem = "does not fit" if classes == CLASSES else "was trained on other classes than"
    assert refused(first, second).startswith(f"{second}: {problem} {first}")


@pytest.fixture
def run_files(tmp_path):
    """run_files(epochs, best): the weight files of a run, in a shell's order."""

    def write(epochs: int, best: int) -> list[Path]:
        for epoch in range(epochs):
            write_network(tmp_path / f"model_{epoch}.pth", epoch)
        write_network(tmp_path / "model_best.pth", best)
        for name, epoch in (("checkpoint.pth", epochs - 1), ("checkpoint_prev.pth", epochs - 2)):
            state = weights_state(network(epoch), CLASSES, {"model": "small"})
            save(tmp_path / name, {**state, "optimizers": {"classifier": {}}})
        return sorted(tmp_path.glob("*.pth"))

    return write


def test_for_all_files_of_a_folder_the_message_lists_the_usable_ones(run_files, tmp_path):
    message = refused(*run_files(epochs=11, best=2))
    assert message == (
        f"{tmp_path}/checkpoint.pth is the full state of a run, not the weights of an epoch; "
        f"{tmp_path}/checkpoint_prev.pth is the full state of a run, not the weights of an epoch; "
        f"{tmp_path}/model_best.pth holds the same weights as {tmp_path}/model_2.pth. "
        "Give the weights of the last epochs only: "
        f"{tmp_path}/model_8.pth {tmp_path}/model_9.pth {tmp_path}/model_10.pth"
    )
    average(*map(Path, message.split("only: ")[1].split()))


def test_a_full_state_among_weights_is_found_under_any_name(run_files, tmp_path):
    run_files(epochs=3, best=2)
    state = (tmp_path / "checkpoint.pth").rename(tmp_path / "model_3.pth")
    assert refused(tmp_path / "model_1.pth", state).startswith(f"{state} is the full state of a run")
    average(state, tmp_path / "checkpoint_prev.pth")  # full states only


def test_the_best_weights_are_refused_next_to_their_own_epoch(run_files, tmp_path):
    run_files(epochs=3, best=1)
    best, epoch, copy = (tmp_path / name for name in ("model_best.pth", "model_1.pth", "copy.pth"))
    average(tmp_path / "model_0.pth", best)
    copy.write_bytes(best.read_bytes())
    for files in ((best, epoch), (epoch, best)):
        assert refused(*files).startswith(f"{best} holds the same weights as {epoch}.")
    assert "holds the same weights as" in refused(copy, best)


@pytest.mark.parametrize(
    ("args", "other_args", "match"),
    [
        ({"mean": [0.3]}, {"mean": [0.5]}, "b.pth: was made with --mean 0.5, and .*a.pth with --mean 0.3; average the"),
        ({"gray": True}, {"gray": False}, "b.pth: was made with --no-gray, and .*a.pth with --gray;"),
        ({"grid": 8}, {"grid": 16}, "b.pth: was made with --grid 16, and .*a.pth with --grid 8"),
        ({"grid": 8, "mask_policy": "learned"}, {}, "a.pth: was trained with masks, and .*b.pth without"),
        ({"finetune": "hot.pth"}, {"grid": 8, "mask_policy": "uniform"}, "b.pth: was trained with masks, and .*a.pth"),
    ],
)
def test_files_of_different_runs_are_not_averaged(args, other_args, match, tmp_path):
    files = [write_network(tmp_path / "a.pth", 0, **args), write_network(tmp_path / "b.pth", 1, **other_args)]
    assert re.search(match, refused(*files))


def test_runs_that_differ_in_other_flags_can_be_averaged(tmp_path):
    flags = ({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 1, "gray": False}, {"finetune": "hot.pth"})
    average(*(write_network(tmp_path / f"{seed}.pth", seed, **args) for seed, args in enumerate(flags)))
