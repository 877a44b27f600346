"""Weight files of other code load, with a sentence for each change made to them, or are refused with one."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from _normal import train as normal
from utils import arguments, export, predict, weight_averaging
from utils.checkpoints.checkpoint import read_weights, weights_state
from utils.runtime.errors import UserError
from utils.training import build
from utils.training import start as training_start
from utils.training.models import create_classifier

CLASSES = ["bright", "dark", "striped"]
SIZES = ["--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32"]


def network(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return create_classifier("test_resnet", classes, 32)


def state_of(seed: int = 0, prefix: str = "", classes: int = 3) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in network(seed, classes).state_dict().items()}


def encoder(seed: int = 0, prefix: str = "") -> dict[str, Tensor]:
    return {key: value for key, value in state_of(seed, prefix).items() if not key.startswith(f"{prefix}fc.")}


def chosen(path: Path, *flags: str, way: str = "--finetune") -> tuple:
    """The arguments, state and weights that the script starts from."""
    parser = normal.build_parser()
    given = arguments.parse_given(parser, ["--device", "cpu", way, str(path), *flags])
    return training_start.choose_start(parser, given, "_normal")


def start(path: Path, *flags: str, way: str = "--finetune") -> nn.Module:
    """The script's classifier before its first step."""
    args, state, weights = chosen(path, *SIZES, *flags, way=way)
    torch.manual_seed(100)
    return build.classifier(args, CLASSES, state, weights, torch.device("cpu"))


def written(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def assert_loaded(model: nn.Module, expected: dict[str, Tensor], *, head: bool = True) -> None:
    """The weights are the expected ones. head: whether those of the head are, too, or are new."""
    actual = model.state_dict()
    for key, value in expected.items():
        if key.startswith("fc."):
            assert torch.equal(actual[key], value) == head, key
        elif not key.endswith("num_batches_tracked"):
            assert torch.equal(actual[key], value), key


LIGHTNING = {"pytorch-lightning_version": "2.5.0", "epoch": 3, "global_step": 9, "hyper_parameters": {"lr": 0.1}}
OTHERS = {
    "criterion.weight": torch.ones(3),
    "val_acc_best.max_value": torch.tensor(-math.inf),
    "train_acc.tp": torch.zeros(3, dtype=torch.long),
}


@pytest.mark.parametrize("way", ["--finetune", "--test-only"])
@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("timm", {"state_dict": state_of(), "arch": "test_resnet", "epoch": 3}, "the weights are its 'state_dict'."),
        (
            "timm with an average",
            {"state_dict": state_of(9), "state_dict_ema": state_of(), "arch": "test_resnet", "optimizer": {}},
            "its 'state_dict_ema', a moving average (--no-use-ema takes the trained weights); not used: st",
        ),
        (
            "torchvision",
            {"model": state_of(9), "model_ema": {"n_averaged": torch.tensor(7), **state_of(0, "module.")}, "epoch": 1},
            "the weights are its 'model_ema', a moving average",
        ),
        ("Lightning", {"state_dict": state_of(0, "net.") | OTHERS, **LIGHTNING},
         "not below 'net.': criterion.weight, val_acc_best.max_value, train_acc.tp."),
        ("Lightning compiled", {"state_dict": state_of(0, "model._orig_mod."), **LIGHTNING}, "'model._orig_mod.' is"),
        ("keys without the prefix", state_of(0, "a.") | {"conv1.weight": torch.zeros(1), "b.fc.weight": torch.zeros(1)},
         "left out, since they are not below 'a.': conv1.weight, b.fc.weight"),
        ("distributed", {"state_dict": state_of(0, "_orig_mod.module.backbone.encoder.")}, "'backbone.encoder.' is"),
        ("another entry", {"weights_of_mine": state_of(), "step": 4}, "the weights are its 'weights_of_mine'"),
        ("teacher", {"teacher": state_of(0, "module."), "student": state_of(9, "module.")}, "its 'teacher'; not used"),
        ("bare", state_of(0, "module._orig_mod.module."), "names no classes"),
    ],
)  # fmt: skip
def test_weights_of_other_code_load_and_changes_are_printed(name, state, message, way, tmp_path, capsys):
    path = written(tmp_path / "other.pth", state)
    flags = ("--model", "test_resnet", *(["--test-only"] if way == "--test-only" else []))
    assert_loaded(start(path, *flags), state_of())
    assert message in capsys.readouterr().out


def test_an_average_without_other_weights_is_loaded(tmp_path, capsys):
    path = written(tmp_path / "average.pth", {"state_dict_ema": state_of(), "arch": "test_resnet"})
    assert_loaded(start(path), state_of())
    assert "'state_dict_ema', a moving average.\n" in capsys.readouterr().out
    assert read_weights(path).averaged
    with pytest.raises(UserError, match=r"^--no-use-ema: .*average.pth holds a moving average only"):
        start(path, "--no-use-ema")


def test_an_empty_average_is_ignored(tmp_path):
    path = written(tmp_path / "empty.pth", {"model": state_of(), "model_ema": {}})
    assert_loaded(start(path, "--model", "test_resnet"), state_of())


@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_an_encoder_without_a_head_gets_a_new_one_for_fine_tuning_only(prefix, tmp_path, capsys):
    path = written(tmp_path / "nohead.pth", encoder(0, prefix))
    model = start(path, "--model", "test_resnet")
    assert_loaded(model, encoder())
    torch.manual_seed(100)
    assert torch.equal(model.fc.weight, create_classifier("test_resnet", 3, 32).fc.weight)
    assert "holds no head: the head is reinitialised" in capsys.readouterr().out
    for way in ("--finetune", "--resume"):
        with pytest.raises(UserError, match=r"nohead.pth: holds an encoder without a head \(fc\).* --finetune first"):
            start(path, "--model", "test_resnet", "--test-only", way=way)


def test_a_head_of_another_shape_is_replaced_and_named(tmp_path, capsys):
    projection = {"fc.0.weight": torch.ones(8, 8), "fc.2.weight": torch.ones(4, 8)}
    assert_loaded(start(written(tmp_path / "m.pth", encoder() | projection), "--model", "test_resnet"), encoder())
    assert "its head (fc.0.weight, fc.2.weight) is not the model's" in capsys.readouterr().out


def test_missing_batch_counters_start_at_0(tmp_path, capsys):
    state = {key: value + 1 for key, value in state_of().items() if "num_batches_tracked" not in key}
    model = start(written(tmp_path / "c.pth", state), "--model", "test_resnet", "--test-only")
    assert_loaded(model, state)
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counters
    assert all(value.dtype == torch.int64 and value == 0 for value in counters.values())
    message = f"holds no num_batches_tracked for {len(counters)} BatchNorm layers; they start at 0"
    assert message in capsys.readouterr().out


def test_the_typed_model_replaces_the_one_of_a_foreign_file(tmp_path, capsys):
    state = {"model": state_of(), "args": argparse.Namespace(model="vit_large_patch16")}
    path = written(tmp_path / "other_name.pth", state)
    assert_loaded(start(path, "--model", "test_resnet"), state_of())
    assert "names its model vit_large_patch16; --model test_resnet is used." in capsys.readouterr().out
    with pytest.raises(UserError, match=r"model vit_large_patch16, which timm does not have; give --model NAME"):
        start(path)
    written(path, {"model": state_of(), "args": argparse.Namespace(model="test_vit")})  # a name that timm has
    assert_loaded(start(path, "--model", "test_resnet", "--test-only"), state_of())


def test_the_model_of_our_own_file_cannot_be_contradicted(tmp_path):
    own = weights_state(network(), CLASSES, {"model": "test_resnet"})
    with pytest.raises(UserError, match=r"--model test_vit: .*own.pth was made with --model test_resnet"):
        start(written(tmp_path / "own.pth", own), "--model", "test_vit")


def test_only_the_model_is_taken_from_timms_arguments(tmp_path, capsys):
    args = argparse.Namespace(model="test_resnet", mean=[0.9], std=[0.8], interpolation="bicubic", gray=True)
    path = written(tmp_path / "timm.pth", {"state_dict": state_of(), "arch": "test_resnet", "args": args})
    args, _, _ = chosen(path)
    assert (args.model, args.mean, args.std) == ("test_resnet", [0.3162], [0.3213])
    assert (args.interpolation, args.gray) == ("bilinear", False)
    printed = capsys.readouterr().out
    assert "used of its arguments: --model test_resnet\n" in printed
    assert "assumed: --val-resize-size 256 --val-crop-size 224 --interpolation bilinear" in printed


def test_the_arguments_next_to_model_are_used_and_printed(tmp_path, capsys):
    args = argparse.Namespace(model="test_resnet", train_crop_size=48, interpolation="bicubic", lr=0.1)
    path = written(tmp_path / "reference.pth", {"model": state_of(0, "_orig_mod."), "args": args})
    args, _, _ = chosen(path)
    assert (args.model, args.train_crop_size, args.interpolation) == ("test_resnet", 48, "bicubic")
    message = "used of its arguments: --model test_resnet --train-crop-size 48 --interpolation bicubic\n"
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({**state_of(), "extra.weight": torch.zeros(1)}, "do not fit the model: unexpected extra.weight"),
        ({"x." + key: value for key, value in encoder().items() if "layer1" not in key}, "do not fit .*missing layer1"),
        (
            {"state_dict": state_of(0, "a.") | state_of(1, "b.")},
            r"holds the model 2 times, below a\., b\.; save the one",
        ),
        ({"first": state_of(), "second": state_of()}, r"holds several state dicts \(first, second\)"),
        ({"state_dict": {**state_of(), "fc.bias": torch.full((3,), math.nan)}}, "'fc.bias' holds NaN or infinite"),
        ({"state_dict": {"model." + "a." * 100_000 + "b": torch.zeros(1)}}, "do not fit the model"),
    ],
    ids=["one more key", "a missing layer", "two models", "two entries", "diverged", "a long name"],
)
def test_weights_that_do_not_fit_are_refused(state, match, tmp_path):
    path = written(tmp_path / "bad.pth", state)
    for flags in ((), ("--test-only",)):
        with pytest.raises(UserError, match=match) as caught:
            start(path, "--model", "test_resnet", *flags)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_commands_read_weights_of_other_code(image_folder, tmp_path, capsys):
    files = [
        written(tmp_path / f"{seed}.ckpt", {"state_dict": state_of(seed, "net.") | OTHERS, "arch": "test_resnet"})
        for seed in (0, 1)
    ]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    image = image_folder / "val" / "dark" / "0.png"
    known = ["--classes", str(names), *SIZES]
    predict.main([str(files[0]), str(image), *known, "--device", "cpu", "--format", "json"])
    printed = capsys.readouterr()
    assert printed.out.startswith('{"image": ')
    assert "'net.' is taken off the front of its keys" in printed.err
    export.main([str(files[0]), *known, "-o", str(tmp_path), "--data-name", "made"])
    exported = read_weights(tmp_path / "test_resnet_made" / "test_resnet_made.safetensors")
    assert set(exported.model) == set(state_of())
    for file in files:
        torch.save({"state_dict": state_of(int(file.stem), "net."), "arch": "test_resnet"}, file)
    weight_averaging.main([*map(str, files), "-o", str(tmp_path / "average.pth")])
    mean = (state_of(0)["fc.weight"] + state_of(1)["fc.weight"]) / 2
    torch.testing.assert_close(start(tmp_path / "average.pth").fc.weight, nn.Parameter(mean))
    with pytest.raises(UserError, match="holds an encoder without a head"):
        predict.main([str(written(tmp_path / "e.pth", encoder())), str(image), *known, "--model", "test_resnet"])
