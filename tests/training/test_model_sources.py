"""Weights and models from the hub and from folders: built and loaded by timm, without network where possible."""

import http.server
import json
import threading
import time
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
from tests.helpers.states import assert_equal_states
from utils import arguments, export, predict
from utils.checkpoints.checkpoint import read_weights
from utils.runtime.errors import UserError
from utils.training import model_sources, start
from utils.training.model_sources import plain_name
from utils.training.models import create_classifier

PRETRAINED = {"input_size": [3, 160, 160], "num_classes": 5, "first_conv": "conv1.0", "classifier": "fc"}
CONFIG = {"architecture": "test_resnet", "num_classes": 5, "num_features": 96, "pretrained_cfg": PRETRAINED}


def write_source(folder: Path, name: str = "test_resnet", classes: int = 5, **config: object) -> nn.Module:
    """A folder as timm's save_for_hf writes it; returns the model with the same weights."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=classes)
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


def put_in_cache(hub_cache: Path, repository: str = "org/net", **source: object) -> nn.Module:
    """As the hub's client leaves a download: refs/main names the snapshot with the files."""
    folder = hub_cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return write_source(folder / "snapshots" / ("0" * 40), **source)


def body(model: nn.Module, head: str = "fc") -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if not key.startswith(f"{head}.")}


# timm's pretrained tags


@pytest.mark.parametrize(
    ("name", "head", "classes"),
    [("test_resnet", "fc", 1000), ("test_convnext.r160_in1k", "head.fc", 3)],
)
def test_a_pretrained_tag_gives_its_weights_and_a_fitting_head(hub_cache, name, head, classes):
    architecture = name.split(".")[0]
    pretrained = put_in_cache(hub_cache, f"timm/{architecture}.r160_in1k", name=architecture, classes=1000)
    model = create_classifier(name, classes, 32, weights="r160_in1k")
    assert_equal_states(body(model, head), body(pretrained, head))
    weight = model.get_submodule(head).weight
    assert weight.shape[0] == classes
    assert torch.equal(weight, pretrained.get_submodule(head).weight) == (classes == 1000)


def test_the_error_for_an_unknown_tag_lists_the_known_ones():
    for name, tags in (("test_resnet", "r160_in1k"), ("resnet50", ".*a1_in1k"), ("test_mambaout", r"\(none\)")):
        with pytest.raises(UserError, match=rf"--weights x: timm's tags for {name} are {tags}"):
            create_classifier(name, 3, 32, weights="x")


@pytest.mark.parametrize("content", [None, b"damaged"], ids=["missing", "damaged"])
def test_a_missing_or_damaged_file_of_a_tag_is_an_error(hub_cache, content):
    if content is not None:
        put_in_cache(hub_cache, "timm/test_resnet.r160_in1k")
        [path] = hub_cache.rglob("model.safetensors")
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"--weights r160_in1k: could not be fetched or loaded \(.+\)\.") as caught:
        create_classifier("test_resnet", 3, 32, weights="r160_in1k")
    assert "\n" not in str(caught.value)


# Repositories and folders


@pytest.mark.parametrize("kind", ["hf-hub:", "hf_hub:", "local-dir:"])
def test_a_source_is_built_for_our_classes_and_loaded_if_asked(kind, hub_cache, tmp_path):
    if kind == "local-dir:":
        source, name = write_source(tmp_path / "net"), f"local-dir:{tmp_path / 'net'}"
    else:
        source, name = put_in_cache(hub_cache), f"{kind}org/net"
    loaded = create_classifier(name, 3, 32, weights="default")
    assert_equal_states(body(loaded), body(source))
    assert loaded.fc.weight.shape[0] == 3
    assert not torch.equal(create_classifier(name, 3, 32).conv1[0].weight, source.conv1[0].weight)
    with pytest.raises(UserError, match=r"--weights a1_in1k: .* has only its own weights; give --weights default"):
        create_classifier(name, 3, 32, weights="a1_in1k")


def test_a_source_that_is_not_in_the_cache_is_downloaded(hub_cache, tmp_path, monkeypatch):
    source, requests = write_source(tmp_path / "net"), []

    def download(repo_id, filename, revision=None, cache_dir=None):
        requests.append((repo_id, filename, revision))
        return str(tmp_path / "net" / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    model = create_classifier("hf-hub:org/net@v2", 3, 32, weights="default")
    assert_equal_states(body(model), body(source))
    assert {("org/net", "config.json", "v2"), ("org/net", "model.safetensors", "v2")} <= set(requests)


def test_without_network_the_error_names_what_is_needed(hub_cache):
    with pytest.raises(UserError) as caught:
        create_classifier("hf-hub:org/absent", 3, 32, flag="--policy-model")
    message = str(caught.value)
    assert message.startswith("--policy-model hf-hub:org/absent: its config.json cannot be read (")
    assert "also a resumed one and --test-only" in message
    assert "local-dir:FOLDER" in message
    assert "\n" not in message


class SlowHub(http.server.SimpleHTTPRequestHandler):
    """Serves the folder `net` in its working folder as the repository org/net; answers the first request late."""

    def do_HEAD(self):
        if self.path == "/":
            time.sleep(0.5)
        super().do_HEAD()

    def translate_path(self, path):
        return super().translate_path(path.replace("/org/net/resolve/main/", "/net/"))

    def end_headers(self):
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{Path(self.path).name}"')
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_slow_hub_is_used(hub_cache, tmp_path, monkeypatch):
    source = write_source(tmp_path / "net")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_sources, "PATIENCE", 0.1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # In version 0.34 a session stays offline once it is.
    getattr(huggingface_hub.utils._http, "reset_sessions", lambda: None)()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowHub) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (huggingface_hub.constants, huggingface_hub.file_download):  # the second, too, in version 0.34
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert model_sources.hub_problem() is None
            model = create_classifier("hf-hub:org/net", 3, 32, weights="default")
        finally:
            server.shutdown()
    assert_equal_states(body(model), body(source))


@pytest.mark.parametrize("name", ["hf-hub:org/absent", "test_resnet"])
def test_a_hub_out_of_reach_is_tried_once(hub_cache, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    with pytest.raises(
        UserError, match=r"\(http://127.0.0.1:9 cannot be reached \(.*Connection refused\), and the file"
    ):
        create_classifier(name, 3, 32, weights="default" if name.startswith("hf-hub:") else "r160_in1k")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    put_in_cache(hub_cache, "timm/test_resnet.r160_in1k", classes=1000)
    create_classifier("test_resnet", 3, 32, weights="r160_in1k")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"its config.json cannot be read \(Config file not found.*Expected a folder with config.json"),
        ("[1]", r"its config.json cannot be read \("),
        (json.dumps(CONFIG | {"architecture": "no_net"}), "its config.json names 'no_net', which timm does not have"),
        (json.dumps(CONFIG | {"architecture": [1]}), r"its config.json names \[1\], which timm does not have"),
        (json.dumps(CONFIG | {"model_args": {"wings": 2}}), r"cannot be built for images of 32 pixels \(.*wings"),
    ],
)
def test_a_folder_without_a_valid_model_is_one_sentence(content, match, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=match) as caught:
        create_classifier(f"local-dir:{tmp_path}", 3, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_with_a_folder_works_in_all_commands_from_any_folder(image_folder, tmp_path, monkeypatch, capsys):
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
    weight = read_weights(checkpoint).model["conv1.0.weight"]
    torch.testing.assert_close(weight, source.conv1[0].weight.data, atol=1e-2, rtol=0)
    best = str(tmp_path / "run" / "model_best.pth")
    common = ["--device", "cpu", "--workers", "0"]
    normal.main(["--resume", best, "--test-only", "--data-path", str(image_folder), *common])
    predict.main([best, str(image_folder / "val" / "dark"), *common])
    export.main([best, "-o", ".", "--data-name", "made"])
    exported = read_weights(Path("test_resnet_finetuned_made") / "test_resnet_finetuned_made.safetensors")
    assert exported.args["model"] == "test_resnet"


def test_a_source_with_model_arguments_cannot_be_exported(tmp_path):
    write_source(tmp_path / "net", model_args={"drop_rate": 0.1})
    with pytest.raises(UserError, match=r"has model_args \(drop_rate\), which an export cannot keep"):
        plain_name(f"local-dir:{tmp_path / 'net'}")


@pytest.fixture
def printed_at_start(capsys):
    """printed_at_start(script, *flags): what a start with these flags prints."""

    def printed(script: object, *flags: str) -> str:
        parser = script.build_parser()
        start.choose_start(parser, arguments.parse_given(parser, list(flags)), script.SCRIPT)
        return capsys.readouterr().out

    return printed


def test_names_that_bring_no_weights_along_are_explained(printed_at_start, tmp_path):
    tagged = ("--model", "resnet18.a1_in1k")
    random = "--model resnet18.a1_in1k: the weights are random; --weights a1_in1k starts from those of the tag.\n"
    assert printed_at_start(normal, *tagged) == random
    assert printed_at_start(normal, *tagged, "--weights", "a1_in1k") == ""
    assert printed_at_start(normal, "--model", "resnet18") == ""
    printed = printed_at_start(normal, "--model", "hf-hub:org/net.x")
    assert "--model hf-hub:org/net.x: the weights are random; --weights default" in printed
    policy = ("--policy-model", "resnet10t.c3_in1k")
    random = "--policy-model resnet10t.c3_in1k: the policy's weights are random; those of the name are not loaded.\n"
    assert printed_at_start(policy_gradient, *policy, "--model", "resnet18") == random
    assert printed_at_start(policy_gradient, *policy, "--mask-policy", "uniform") == ""
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "bare.pth")
    assert "random" not in printed_at_start(normal, *tagged, "--finetune", str(tmp_path / "bare.pth"))
