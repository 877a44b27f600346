"""Hostile weight files are refused with one sentence, before anything is unpacked, run or waited for.

Pickles are in test_hostile_pickles.py, images in test_hostile_images.py.
"""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY, MakesAFolder
from tests.helpers.parsing import PARSERS
from tests.helpers.states import as_bytes
from utils import arguments, weight_averaging
from utils.checkpoints import checkpoint
from utils.runtime.errors import UserError

WAYS = ("--resume", "--finetune", "--test-only", "averaging")


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("run")
    normal.main([*SMALL, "--epochs", "1", "--data-path", str(image_folder), "--output-dir", str(folder)])
    return folder


@pytest.fixture
def state(run):
    return torch.load(run / "checkpoint.pth", weights_only=True)


@pytest.fixture
def use(run, image_folder, tmp_path, monkeypatch):
    """use(way, path): read the file in one of WAYS."""

    def use(way: str, path: Path) -> None:
        if way == "averaging":
            output, first = str(tmp_path / "average.pth"), torch.load(run / "checkpoint.pth", weights_only=True)
            first["model"]["fc.bias"] += 1  # equal weights, and weights among full states, are refused
            torch.save(first, tmp_path / "first.pth")
            monkeypatch.setattr(sys, "argv", ["average", str(tmp_path / "first.pth"), str(path), "-o", output])
            weight_averaging.main()
            return
        small = ["--device", "cpu", "--workers", "0", "--data-path", str(image_folder)]
        ways = {"--resume": ["--epochs", "2"], "--finetune": [*SMALL, "--epochs", "1"], "--test-only": ["--test-only"]}
        flags = [*small, *ways[way], "--output-dir", str(tmp_path / f"out{way}")]
        normal.main([*flags, "--finetune" if way == "--finetune" else "--resume", str(path)])

    return use


def refused(use, path: Path, match: str, ways=WAYS) -> None:
    for way in ways:
        with pytest.raises(UserError, match=match) as caught:
            use(way, path)
        message = str(caught.value)
        assert str(path) in message, way
        assert "\n" not in message
        assert len(message) < 500
    assert not list(path.parent.glob("out*")), "nothing is written"
    assert not (path.parent / "average.pth").exists()


# Other files


def test_the_unchanged_files_are_accepted(use, run):
    """Without this the refusals below would prove nothing."""
    for way, name in zip(WAYS, ("checkpoint.pth", "model_0.pth", "checkpoint.pth", "checkpoint.pth"), strict=True):
        use(way, run / name)


def test_folders_and_pipes_are_refused(use, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")  # which would wait for its writer
    refused(use, tmp_path / "folder.pth", "folder.pth: Is a directory; expected a checkpoint or weights")
    refused(use, tmp_path / "pipe.pth", "pipe.pth: not a regular file; expected a checkpoint or weights")


def test_a_file_without_read_permission_is_refused(use, run, tmp_path):
    path = tmp_path / "secret.pth"
    path.write_bytes((run / "checkpoint.pth").read_bytes())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    refused(use, path, "secret.pth: no permission to read this file")


@pytest.mark.parametrize(
    ("name", "write", "match"),
    [
        ("zip.pth", as_bytes, "could run code when read; refused"),
        ("old.pth", lambda state: as_bytes(state, old_format=True), "could run code when read"),
        ("plain.pth", lambda state: pickle.dumps(state, protocol=2), "it is not a file of torch.save"),
        ("disguised.safetensors", as_bytes, r"not a checkpoint, or damaged \("),
    ],
)
def test_no_file_runs_code(use, state, tmp_path, name, write, match):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(MakesAFolder(marker)))
    marker.rmdir()  # the pickle works
    (tmp_path / name).write_bytes(write({**state, "args": MakesAFolder(marker)}))
    refused(use, tmp_path / name, f"{name}: .*{match}")
    assert not marker.exists()


# Tensors


HUGE = r"'fc.bias' claims the shape \(1000000, 1000000\): alone or with others, more than the file holds; refused"
NOT_FINITE = "'fc.bias' holds NaN or infinite values: the training had diverged; use an earlier file"
NOT_DENSE = "'fc.bias' is not a dense tensor"
TENSORS = {
    "expanded": (lambda: torch.zeros(1).expand(10**6, 10**6), HUGE),
    "sparse": (lambda: torch.zeros(3).to_sparse(), NOT_DENSE),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), NOT_DENSE),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "'fc.bias' has the type torch.complex64, expected"),
    "infinite": (lambda: torch.tensor([0.0, float("-inf"), 0.0]), NOT_FINITE),
    "infinite as float32": (lambda: torch.full((3,), 1e300, dtype=torch.float64), NOT_FINITE),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_unusable_tensors_are_refused(use, state, tmp_path, kind):
    make, match = TENSORS[kind]
    state["model"]["fc.bias"] = make()
    torch.save(state, tmp_path / "bad.pth")
    refused(use, tmp_path / "bad.pth", f"bad.pth: .*{match}")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("fc.weight", torch.zeros(()), r"fc.weight is \(\), expected \(3, "),
        ("fc.bias", torch.zeros(3, dtype=torch.int64), "fc.bias is of torch.int64, expected torch.float32"),
    ],
)
def test_weights_of_another_shape_or_type_are_refused(use, state, tmp_path, key, value, match):
    state["model"][key] = value
    torch.save(state, tmp_path / "bad.pth")
    refused(use, tmp_path / "bad.pth", f"bad.pth: these weights do not fit the model: {match}", WAYS[:3])
    refused(use, tmp_path / "bad.pth", f"bad.pth: does not fit .*: {key} differs", WAYS[3:])


def test_tensors_in_nested_containers_are_checked(tmp_path, state):
    torch.save({**state, "optimizers": {"a": [(torch.zeros(1).expand(10**12),)]}}, tmp_path / "deep.pth")
    with pytest.raises(UserError, match=r"deep.pth: its 'a' claims the shape \(1000000000000,\)"):
        checkpoint.read_weights(tmp_path / "deep.pth")


# Metadata of safetensors


def metadata_of(state: dict) -> dict:
    return {name: state[name] for name in ("format_version", "classes", "args")}


DAMAGED = r"not a checkpoint, or damaged \("
METADATA = {
    "a list": (lambda entries: "[]", "is not a JSON object"),
    "deep": (lambda entries: "[" * 100_000, DAMAGED),
    "a very long number": (lambda entries: '{"args": %s}' % ("9" * 100_000), DAMAGED),
    "no entries": (lambda entries: "{}", "its 'classes' is not a list of names"),
    "twice": (lambda entries: json.dumps({**entries, "classes": ["a", "b", "a"]}), "is not a list of different names"),
    "text": (lambda entries: json.dumps({**entries, "args": "--model"}), "its 'args' is not a dict"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_hostile_metadata_is_refused(use, state, tmp_path, kind):
    make, match = METADATA[kind]
    metadata = {checkpoint.METADATA: make(metadata_of(state))}
    safetensors.torch.save_file(state["model"], tmp_path / "bad.safetensors", metadata)
    refused(use, tmp_path / "bad.safetensors", f"bad.safetensors: .*{match}", WAYS[1:])


def test_impossible_arguments_in_metadata_are_ignored(use, state, tmp_path):
    strange = {"mean": ["0.3"], "gray": "yes", "val_crop_size": -5, "val_resize_size": 1e30, "std": [[[]]]}
    entries = {**metadata_of(state), "args": {**state["args"], **strange}, "model": {"fc.bias": 1}, "policy_net": 5}
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file(state["model"], path, {checkpoint.METADATA: json.dumps(entries)})
    weights = checkpoint.read_weights(path)
    assert weights.model.keys() == state["model"].keys()
    assert (weights.policy_net, "std" in weights.args) == (None, False)
    args = arguments.for_weights(PARSERS["_normal"], {"resume": "f"}, weights.args, "f", test_only=True)
    assert (args.mean, args.gray, args.std, args.val_crop_size) == ([0.3162], False, [0.3213], 224)


@pytest.mark.slow
def test_unusable_policies_are_refused(image_folder, tmp_path):
    flags = [*SMALL_POLICY, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(tmp_path / "run")]
    policy_gradient.main(flags)
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    whole = dict(state["policy_net"])
    resume = ["--device", "cpu", "--data-path", str(image_folder), "--epochs", "2", "--resume"]
    for value, match in (
        ({**whole, "prior": torch.full_like(whole["prior"], float("nan"))}, "its 'prior' holds NaN or infinite values"),
        ([1], "its 'policy_net' is not a dict"),
    ):
        torch.save({**state, "policy_net": value}, tmp_path / "bad.pth")
        for more in ([], ["--test-only"]):
            with pytest.raises(UserError, match=f"bad.pth: .*{match}"):
                policy_gradient.main([*resume, str(tmp_path / "bad.pth"), *more])
    for name in ("policy_net", "objective"):
        torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=f"bad.pth: its '{name}' is not a dict; this is not a complete"):
            policy_gradient.main([*resume, str(tmp_path / "bad.pth")])


# Full states, as far as test_full_state.py does not cover them


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state[0].update(momentum_buffer=torch.zeros(1)),  # the fused kernel would write beyond it
        lambda state: state[0].update(momentum_buffer=torch.zeros_like(state[0]["momentum_buffer"], dtype=torch.int64)),
        lambda state: state[0].update(momentum_buffer="text"),
        lambda state: state.update({10**6: {}}),
    ],
    ids=["one element", "integers", "text", "one more parameter"],
)
def test_an_optimiser_state_of_other_shapes_is_refused(use, state, tmp_path, spoil):
    spoil(state["optimizers"]["classifier"]["state"])
    torch.save(state, tmp_path / "bad.pth")
    refused(use, tmp_path / "bad.pth", "bad.pth: its classifier optimiser's state does not fit this run", WAYS[:1])


def test_options_of_an_optimiser_come_from_the_arguments(use, state, tmp_path):
    [group] = state["optimizers"]["classifier"]["param_groups"]
    group.update(momentum="text", weight_decay=-1.0, fused=None)
    torch.save(state, tmp_path / "other.pth")
    use("--resume", tmp_path / "other.pth")
    [saved] = torch.load(tmp_path / "out--resume" / "checkpoint.pth", weights_only=True)["optimizers"].values()
    options = {"momentum": 0.9, "weight_decay": 1e-4, "fused": True}
    assert options.items() <= saved["param_groups"][0].items()


def test_an_average_of_another_model_is_refused(use, state, tmp_path):
    args, average = {**state["args"], "model_ema": True}, {**state["model"], "fc.bias": torch.zeros(4)}
    torch.save({**state, "args": args, "model_ema": average, "model_ema_updates": 1}, tmp_path / "bad.pth")
    refused(use, tmp_path / "bad.pth", "bad.pth, 'model_ema': these weights do not fit the model: ", WAYS[:1])
