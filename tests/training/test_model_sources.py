"""Models of the hub and of folders: built and loaded as timm does it, rebuilt without the network, or one sentence."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL
from utils import arguments, export, predict
from utils.checkpoints.checkpoint import read_weights
from utils.runtime.errors import UserError
from utils.training import start as run
from utils.training.models import create_classifier

CONFIG = {
    "architecture": "test_resnet",
    "num_classes": 5,
    "num_features": 96,
    "pretrained_cfg": {
        "input_size": [3, 160, 160],
        "num_classes": 5,
        "first_conv": "conv1.0",
        "classifier": "fc",
        "mean": [0.5, 0.5, 0.5],
    },
}


def write_source(folder: Path, **config: object) -> nn.Module:
    """A folder as timm's save_for_hf writes it; returns the model whose weights it holds."""
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=5)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return model


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(hub_cache: Path, repository: str = "org/net") -> nn.Module:
    folder = hub_cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return write_source(folder / "snapshots" / ("0" * 40))


def body(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}


def assert_body(model: nn.Module, expected: nn.Module, *, equal: bool = True) -> None:
    same = [
        torch.equal(value, body(expected)[key]) for key, value in body(model).items() if key.endswith("conv1.weight")
    ]
    assert len(same) > 2
    assert all(same) if equal else not any(same)


@pytest.mark.parametrize("kind", ["hf-hub:", "hf_hub:", "local-dir:"])
def test_a_named_source_is_built_for_our_classes_and_loaded_if_asked(kind, hub_cache, tmp_path):
    source = put_in_cache(hub_cache) if kind != "local-dir:" else write_source(tmp_path / "net")
    name = f"{kind}org/net" if kind != "local-dir:" else f"local-dir:{tmp_path / 'net'}"
    loaded = create_classifier(name, 3, 32, weights="default")
    assert_body(loaded, source)
    assert loaded.fc.weight.shape[0] == 3
    assert_body(create_classifier(name, 3, 32), source, equal=False)
    with pytest.raises(UserError, match=r"--weights a1_in1k: .* has weights of its own only; give --weights default"):
        create_classifier(name, 3, 32, weights="a1_in1k")


def test_a_source_that_is_not_in_the_cache_is_downloaded(hub_cache, tmp_path, monkeypatch):
    source, asked = write_source(tmp_path / "net"), []

    def download(repo_id, filename, revision=None, cache_dir=None):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / "net" / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    assert_body(create_classifier("hf-hub:org/net@v2", 3, 32, weights="default"), source)
    assert ("org/net", "config.json", "v2") in asked
    assert ("org/net", "model.safetensors", "v2") in asked


def test_without_the_network_one_sentence_says_what_is_needed(hub_cache):
    for weights in (None, "default"):
        with pytest.raises(UserError) as caught:
            create_classifier("hf-hub:org/absent", 3, 32, weights=weights, flag="--policy-model")
        message = str(caught.value)
        assert message.startswith("--policy-model hf-hub:org/absent: its config.json cannot be read (")
        assert "a resumed one and --test-only too" in message
        assert "local-dir:FOLDER" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"its config.json cannot be read \(Config file not found.*Expected a folder with config.json"),
        ("{", r"its config.json cannot be read \("),
        ("[1]", r"its config.json cannot be read \("),
        (json.dumps(CONFIG | {"architecture": "no_net"}), "its config.json names 'no_net', which timm does not have"),
        (json.dumps(CONFIG | {"architecture": [1]}), r"its config.json names \[1\], which timm does not have"),
        (json.dumps(CONFIG | {"model_args": {"wings": 2}}), r"cannot be built for images of 32 pixels \(.*wings"),
    ],
)
def test_a_folder_that_is_no_model_is_one_sentence(content, match, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=match) as caught:
        create_classifier(f"local-dir:{tmp_path}", 3, 32)
    assert "\n" not in str(caught.value)


def test_a_name_that_lacks_its_source_is_explained():
    with pytest.raises(
        UserError, match=r"--model org/net: timm has no such model; one of the hub is named hf-hub:org/net"
    ):
        create_classifier("org/net", 3, 32)


def test_a_run_with_a_folder_goes_through_all_commands_from_another_folder(image_folder, tmp_path, monkeypatch, capsys):
    source = write_source(tmp_path / "net")
    monkeypatch.chdir(tmp_path)
    name = f"local-dir:{tmp_path / 'net'}"
    small = [flag if flag != "test_resnet" else "local-dir:net" for flag in SMALL]
    flags = [*small, "--data-path", str(image_folder), "--output-dir", str(tmp_path / "run"), "--lr", "1e-6"]
    normal.main([*flags, "--epochs", "1", "--weights", "default"])
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    assert read_weights(checkpoint).args["model"] == name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    normal.main(["--resume", str(checkpoint), "--epochs", "2", "--device", "cpu"])
    assert f"paths taken from this file: --data-path {image_folder} --model {name}\n" in capsys.readouterr().out
    torch.testing.assert_close(
        read_weights(checkpoint).model["conv1.0.weight"], source.conv1[0].weight.data, atol=1e-2, rtol=0
    )
    best = str(tmp_path / "run" / "model_best.pth")
    normal.main(
        ["--resume", best, "--test-only", "--data-path", str(image_folder), "--device", "cpu", "--workers", "0"]
    )
    predict.main([best, str(image_folder / "val" / "dark"), "--device", "cpu", "-j", "0"])
    export.main([best, "-o", ".", "--data-name", "made"])
    exported = read_weights(
        tmp_path / "elsewhere" / "test_resnet_finetuned_made" / "test_resnet_finetuned_made.safetensors"
    )
    assert exported.args["model"] == "test_resnet"


def test_a_model_built_with_arguments_of_its_own_is_not_exported(image_folder, tmp_path):
    write_source(tmp_path / "net", model_args={"drop_rate": 0.1})
    small = [flag if flag != "test_resnet" else f"local-dir:{tmp_path / 'net'}" for flag in SMALL]
    normal.main([*small, "--data-path", str(image_folder), "--output-dir", str(tmp_path / "run"), "--epochs", "1"])
    with pytest.raises(
        UserError, match=r"is built with arguments of its own \(drop_rate\), which an export cannot keep"
    ):
        export.main([str(tmp_path / "run" / "model_0.pth"), "-o", str(tmp_path), "--data-name", "made"])


def printed_at_start(script: object, capsys, *flags: str) -> str:
    parser = script.build_parser()
    run.choose_start(parser, arguments.parse_given(parser, list(flags)), script.SCRIPT)
    return capsys.readouterr().out


def test_a_name_that_brings_no_weights_along_says_how_to_get_them(capsys, tmp_path):
    tagged = ("--model", "resnet18.a1_in1k")
    random = "--model resnet18.a1_in1k: the weights are random; --weights a1_in1k starts from those of the tag.\n"
    assert printed_at_start(normal, capsys, *tagged) == random
    assert printed_at_start(normal, capsys, *tagged, "--weights", "a1_in1k") == ""
    assert printed_at_start(normal, capsys, "--model", "resnet18") == ""
    hub = ("--model", "hf-hub:org/net.x")
    assert "--model hf-hub:org/net.x: the weights are random; --weights default" in printed_at_start(
        normal, capsys, *hub
    )
    policy = ("--policy-model", "resnet10t.c3_in1k")
    printed = printed_at_start(policy_gradient, capsys, *policy, "--model", "resnet18")
    assert (
        printed
        == "--policy-model resnet10t.c3_in1k: the policy's weights are random; those of the name are not loaded.\n"
    )
    assert printed_at_start(policy_gradient, capsys, *policy, "--mask-policy", "uniform") == ""
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "bare.pth")
    assert "random" not in printed_at_start(normal, capsys, *tagged, "--finetune", str(tmp_path / "bare.pth"))
