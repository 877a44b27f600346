"""Files made to harm: each is refused with one sentence that says why, before anything is unpacked, run or waited for.

Images are in test_hostile_images.py.
"""

import argparse
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY, MakesAFolder
from tests.helpers.parsing import PARSERS, parse
from utils import arguments, weight_averaging
from utils.checkpoints import checkpoint
from utils.checkpoints import verify as verification
from utils.runtime.errors import UserError

RNG = torch.Generator().manual_seed(0).get_state()
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


def as_bytes(state: object, **settings) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **settings)
    return buffer.getvalue()


# No files of weights at all


def test_the_files_that_are_used_here_are_good(use, run):
    """Or the refusals below would say nothing."""
    for way, name in zip(WAYS, ("checkpoint.pth", "model_0.pth", "checkpoint.pth", "checkpoint.pth"), strict=True):
        use(way, run / name)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"This is text.\n"], ids=["nothing", "zeros", "text"])
def test_what_holds_no_weights(use, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(use, tmp_path / name, f"{name}: not a checkpoint")


def test_what_is_no_file(use, tmp_path):
    refused(use, tmp_path / "absent.pth", "absent.pth: no such file")
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")  # which would wait for its writer
    for name in ("folder.pth", "pipe.pth"):
        refused(use, tmp_path / name, f"{name}: not a regular file; expected a checkpoint or weights")
    with pytest.raises(UserError, match="File name too long"):
        checkpoint.read("n" * 300)


def test_a_file_that_may_not_be_read(use, run, tmp_path):
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
        ("old.pth", lambda state: as_bytes(state, _use_new_zipfile_serialization=False), "could run code when read"),
        ("plain.pth", lambda state: pickle.dumps(state, protocol=2), "could run code when read; refused"),
        ("newer.pth", lambda state: pickle.dumps(state, protocol=4), "not a checkpoint"),
        ("disguised.safetensors", as_bytes, r"not a checkpoint, or damaged \("),
        ("plain.safetensors", lambda state: pickle.dumps(state, protocol=2), r"not a checkpoint, or damaged \("),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_is_not_run(use, state, tmp_path, name, write, match):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(MakesAFolder(marker)))
    marker.rmdir()  # it works
    (tmp_path / name).write_bytes(write({**state, "args": MakesAFolder(marker)}))
    refused(use, tmp_path / name, f"{name}: .*{match}")
    assert not marker.exists()


# Archives that claim more than they hold


def zip_of(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def records_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def split(archive: bytes) -> tuple[bytes, bytes]:
    """What stands before a zip's directory, and the directory without the end record."""
    size, offset = struct.unpack("<2L", archive[-10:-2])
    return archive[:offset], archive[offset : offset + size]


def end_record(count: int, size: int, offset: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, offset, 0)


@pytest.fixture
def never_unpacked(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a record was unpacked")

    monkeypatch.setattr(zipfile.ZipFile, "read", fail)
    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    monkeypatch.setattr(torch, "load", fail)


def test_a_bomb_is_not_unpacked(use, tmp_path):
    content = zip_of(records_of(as_bytes({"a": torch.zeros(5_000_000)})), zipfile.ZIP_DEFLATED)
    assert len(content) < 30_000
    (tmp_path / "bomb.pth").write_bytes(content)
    assert torch.load(tmp_path / "bomb.pth", weights_only=True)["a"].shape == (5_000_000,)  # torch alone unpacks it
    refused(use, tmp_path / "bomb.pth", r"bomb.pth: .*\(its record .* is compressed, which torch.save never does")


def test_nothing_is_unpacked_before_the_sizes_are_checked(tmp_path, request):
    compressed = zip_of(records_of(as_bytes({"a": torch.zeros(1000)})), zipfile.ZIP_DEFLATED)
    before, directory = split(zip_of({"archive/data.pkl": b"x" * 100}))
    overlapping = before + 50 * directory + end_record(50, 50 * len(directory), len(before))
    request.getfixturevalue("never_unpacked")
    for content, match in ((compressed, "is compressed"), (overlapping, "records claim more bytes than the file has")):
        (tmp_path / "bomb.pth").write_bytes(content)
        with pytest.raises(UserError, match=f"bomb.pth: not a checkpoint, or damaged .*{match}"):
            checkpoint.read(tmp_path / "bomb.pth")


def test_an_archive_of_two_directories_shows_torch_what_was_verified(tmp_path):
    """Python looks for the directory before the end record, torch where the end record says: here a hidden one."""
    hidden = zip_of(records_of(as_bytes({"a": torch.zeros(1_000_000)})), zipfile.ZIP_DEFLATED)
    seen = zip_of(records_of(as_bytes({"a": torch.zeros(4)})))
    before_hidden, hidden_directory = split(hidden)
    before_seen, directory = split(seen)
    assert len(directory) == len(hidden_directory)
    moved = len(before_hidden) + len(hidden_directory)  # by so much the second archive stands later
    python_adds = moved + len(before_seen) - len(before_hidden)  # since the end record names the first directory
    place = 0
    patched = bytearray(directory)
    while place < len(directory):
        lengths = struct.unpack_from("<3H", directory, place + 28)
        (offset,) = struct.unpack_from("<l", directory, place + 42)
        struct.pack_into("<l", patched, place + 42, offset + moved - python_adds)
        place += 46 + sum(lengths)
    end = end_record(len(records_of(seen)), len(directory), len(before_hidden))
    path = tmp_path / "confusing.pth"
    path.write_bytes(before_hidden + hidden_directory + before_seen + patched + end)
    assert torch.load(path, weights_only=True)["a"].shape == (1_000_000,)
    assert torch.equal(checkpoint.read(path)["a"], torch.zeros(4))


def test_a_pickle_that_holds_itself_does_not_hang(tmp_path):
    circle: list = []
    circle.append(circle)
    doubled: list = [torch.zeros(1)]
    for _ in range(60):
        doubled = [doubled, doubled]
    torch.save({"model": {"a": torch.ones(2)}, "args": {"x": circle, "y": doubled, "lr": 0.1}}, tmp_path / "deep.pth")
    assert checkpoint.read_weights(tmp_path / "deep.pth").args == {"lr": 0.1}


# Tensors


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


HUGE = r"'fc.bias' claims the shape \(1000000, 1000000\), more than the file holds; refused"
NOT_FINITE = "'fc.bias' holds NaN or infinite values: the training had diverged; use an earlier file"
NOT_DENSE = "'fc.bias' is not a dense tensor"
TENSORS = {
    "expanded": (lambda: torch.zeros(1).expand(10**6, 10**6), HUGE),
    "sparse": (lambda: torch.zeros(3).to_sparse(), NOT_DENSE),
    "sparse and huge": (lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6)), NOT_DENSE),
    "quantised": (quantised, NOT_DENSE),
    "without values": (lambda: torch.empty(10**6, 10**6, device="meta"), NOT_DENSE),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]), NOT_DENSE),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "'fc.bias' has the type torch.complex64, expected"),
    "text": (lambda: "text", "holds no state dict: "),
    "NaN": (lambda: torch.tensor([0.0, float("nan"), 0.0]), NOT_FINITE),
    "infinite": (lambda: torch.tensor([0.0, float("-inf"), 0.0]), NOT_FINITE),
    "infinite as float32": (lambda: torch.full((3,), 1e300, dtype=torch.float64), NOT_FINITE),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_that_are_no_weights(use, state, tmp_path, kind):
    make, match = TENSORS[kind]
    state["model"]["fc.bias"] = make()
    torch.save(state, tmp_path / "bad.pth")
    refused(use, tmp_path / "bad.pth", f"bad.pth: .*{match}")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("fc.weight", torch.zeros(()), r"fc.weight is \(\), expected \(3, "),
        ("fc.bias", torch.zeros(()), r"fc.bias is \(\), expected \(3,\)"),
        ("fc.bias", torch.zeros(3, dtype=torch.bool), "fc.bias is of torch.bool, expected torch.float32"),
        ("fc.bias", torch.zeros(3, dtype=torch.int64), "fc.bias is of torch.int64, expected torch.float32"),
        (
            "bn1.num_batches_tracked",
            torch.tensor(True),
            "bn1.num_batches_tracked is of torch.bool, expected torch.int64",
        ),
    ],
)
def test_weights_of_another_shape_or_kind(use, state, tmp_path, key, value, match):
    state["model"][key] = value
    torch.save(state, tmp_path / "bad.pth")
    refused(use, tmp_path / "bad.pth", f"bad.pth: these weights do not fit the model: {match}", WAYS[:3])
    refused(use, tmp_path / "bad.pth", f"bad.pth: does not fit .*: {key} differs", WAYS[3:])


def test_tensors_deep_in_a_file(tmp_path, state):
    huge, sparse = torch.zeros(1).expand(10**12), torch.zeros(3).to_sparse()
    for place, match in (
        ({"optimizers": {"a": [(huge,)]}}, r"its 'a' claims the shape \(1000000000000,\)"),
        ({"args": argparse.Namespace(mean=sparse)}, "its 'mean' is not a dense tensor"),
    ):
        torch.save({**state, **place}, tmp_path / "deep.pth")
        with pytest.raises(UserError, match=f"deep.pth: {match}"):
            checkpoint.read_weights(tmp_path / "deep.pth")


# What a safetensors file says of itself


def whole(state: dict) -> dict:
    return {name: state[name] for name in ("format_version", "classes", "args")}


SAID = {
    "no JSON": (lambda said: "{", r"not a checkpoint, or damaged \("),
    "nothing": (lambda said: "", r"not a checkpoint, or damaged \("),
    "a list": (lambda said: "[]", "is not a JSON object"),
    "deep": (lambda said: "[" * 100_000, r"not a checkpoint, or damaged \("),
    "a number without end": (lambda said: '{"args": %s}' % ("9" * 100_000), r"not a checkpoint, or damaged \("),
    "long": (lambda said: " " * 4_000_001, "has 4000001 characters, more than 4000000"),
    "empty": (lambda said: "{}", "its 'classes' is not a list of names"),
    "another version": (lambda said: json.dumps({**said, "classes": None}), "its 'classes' is not a list of names"),
    "numbers": (lambda said: json.dumps({**said, "classes": [1, 2, 3]}), "its 'classes' is not a list of names"),
    "twice": (lambda said: json.dumps({**said, "classes": ["a", "b", "a"]}), "is not a list of different names"),
    "text": (lambda said: json.dumps({**said, "args": "--model"}), "its 'args' is not a dict"),
}
FIT = {
    "too few": (lambda said: json.dumps({**said, "classes": ["bright"]}), "was trained on classes of other names"),
    "model": (
        lambda said: json.dumps({**said, "args": {"model": "x/../y"}}),
        "^--model x/../y: timm has no such model",
    ),
}


@pytest.mark.parametrize("kind", [*SAID, *FIT])
def test_safetensors_that_say_what_they_should_not(use, state, tmp_path, kind):
    make, match = {**SAID, **FIT}[kind]
    metadata = {checkpoint.METADATA: make(whole(state))}
    safetensors.torch.save_file(state["model"], tmp_path / "bad.safetensors", metadata)
    if kind in SAID:
        refused(use, tmp_path / "bad.safetensors", f"bad.safetensors: .*{match}", WAYS[1:])
        return
    with pytest.raises(UserError, match=match) as caught:
        use("--test-only", tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)


def test_arguments_in_safetensors_that_no_flag_could_have_given_have_no_say(use, state, tmp_path):
    strange = {
        "mean": ["0.3"],
        "gray": "yes",
        "val_crop_size": -5,
        "std": [[[]]],
        "val_resize_size": 1e30,
        "test_only": False,
        "resume": "/etc",
    }
    said = {**whole(state), "args": {**state["args"], **strange}, "model": {"fc.bias": 1}, "policy_net": 5}
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file(state["model"], path, {checkpoint.METADATA: json.dumps(said)})
    found = checkpoint.read_weights(path)
    assert found.model.keys() == state["model"].keys()
    assert (found.policy_net, "std" in found.args) == (None, False)
    args = arguments.for_weights(PARSERS["_normal"], {"resume": "f"}, found.args, "f", test_only=True)
    assert (args.mean, args.gray, args.std) == ([0.3162], False, [0.3213])
    assert (args.val_crop_size, args.val_resize_size) == (224, 256)


def test_a_policy_that_is_none(image_folder, tmp_path):
    flags = [*SMALL_POLICY, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(tmp_path / "run")]
    policy_gradient.main(flags)
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    whole = dict(state["policy_net"])
    resume = ["--device", "cpu", "--data-path", str(image_folder), "--epochs", "2", "--resume"]
    for value, match in (
        ({**whole, "prior": torch.full_like(whole["prior"], float("nan"))}, "its 'prior' holds NaN or infinite values"),
        ({**whole, "prior": "text"}, "its 'prior' is a str, expected a tensor"),
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


# Full states


def entries() -> list[tuple[str, object]]:
    number_state = {"cpu": RNG}
    return [
        *[("format_version", value) for value in ("1", None)],
        *[("script", value) for value in (5, None)],
        *[("epoch", value) for value in (-1, 1.0, "1", True, 10**9, None)],
        *[("step", value) for value in (-1, 0.5, None)],
        *[("images", value) for value in (-1, 2**70)],
        *[("seconds", value) for value in (-1.0, float("nan"), "1")],
        *[("skipped_steps", value) for value in (-1, "0", torch.zeros(1))],
        *[("best_f1", value) for value in (float("nan"), 2.0, "best")],
        *[("classes", value) for value in ("abc", [1, 2, 3], None, {}, ["a", "b", "a"])],
        *[("args", value) for value in ([], None, argparse.Namespace())],
        *[("rng", value) for value in ([], {}, [number_state, {}], [RNG], ["cpu"], [5])],
        *[("rng", [{"cpu": value}]) for value in (torch.zeros(5056), RNG[1:], "x", None)],
        ("rng", [{"cpu": torch.zeros_like(RNG)}]),
        *[("optimizers", value) for value in ([], {"classifier": []}, {"classifier": {"state": {}}})],
        ("optimizers", {"classifier": {"state": {0: 5}, "param_groups": []}}),
        ("optimizers", {"classifier": {"state": {}, "param_groups": [1]}}),
        ("optimizers", {"classifier": {"state": {}, "param_groups": [{"params": "abc"}]}}),
        *[("scaler", value) for value in ([], {"scale": 1.0}, None)],
        *[("meters", value) for value in ([], {}, {"names": ["a"], "count": 1, "totals": torch.zeros(1, 2).double()})],
        ("meters", {"names": [], "count": -1, "totals": torch.zeros(1, 0).double()}),
        *[("model", value) for value in ([], None)],
    ]


@pytest.mark.parametrize(("name", "value"), entries(), ids=lambda value: str(value)[:30].replace("\n", ""))
def test_entries_that_no_run_saves(state, tmp_path, name, value):
    torch.save({**state, name: value}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=f"bad.pth: its '{name}' is not .*; this is not a complete") as caught:
        checkpoint.read_checkpoint(tmp_path / "bad.pth", "_normal")
    assert "\n" not in str(caught.value)
    del state[name]
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad.pth: (its|holds weights but no full training state)"):
        checkpoint.read_checkpoint(tmp_path / "bad.pth", "_normal")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state[0].update(momentum_buffer=torch.zeros(1)),  # the fused kernel would write beyond it
        lambda state: state[0].update(momentum_buffer=torch.zeros(())),
        lambda state: state[0].update(momentum_buffer=torch.zeros_like(state[0]["momentum_buffer"], dtype=torch.int64)),
        lambda state: state[0].update(momentum_buffer="text"),
        lambda state: state.update({10**6: {}}),
    ],
    ids=["one element", "no dimension", "integers", "text", "a parameter more"],
)
def test_an_optimiser_of_other_shapes(use, state, tmp_path, spoil):
    spoil(state["optimizers"]["classifier"]["state"])
    torch.save(state, tmp_path / "bad.pth")
    refused(use, tmp_path / "bad.pth", "bad.pth: its classifier optimiser's state does not fit this run", WAYS[:1])


def test_the_options_of_an_optimiser_come_from_the_arguments(use, state, tmp_path):
    [group] = state["optimizers"]["classifier"]["param_groups"]
    group.update(momentum="text", weight_decay=-1.0, fused=None)
    torch.save(state, tmp_path / "other.pth")
    use("--resume", tmp_path / "other.pth")
    [saved] = torch.load(tmp_path / "out--resume" / "checkpoint.pth", weights_only=True)["optimizers"].values()
    assert {name: saved["param_groups"][0][name] for name in ("momentum", "weight_decay", "fused")} == {
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "fused": True,
    }


def test_a_moving_average_of_another_model(use, state, tmp_path):
    for average in ({"fc.bias": torch.zeros(3)}, {**state["model"], "fc.bias": torch.zeros(4)}):
        args = {**state["args"], "model_ema": True}
        torch.save({**state, "args": args, "model_ema": average, "model_ema_updates": 1}, tmp_path / "bad.pth")
        refused(use, tmp_path / "bad.pth", "bad.pth, 'model_ema': these weights do not fit the model: ", WAYS[:1])


def test_a_scaler_is_there_under_fp16_only(state, tmp_path):
    scaler = torch.amp.GradScaler("cpu").state_dict()
    for args, content, whole in (
        ({"amp": True, "amp_dtype": "fp16"}, scaler, True),
        ({"amp": True, "amp_dtype": "fp16"}, {}, False),
        ({"amp": True, "amp_dtype": "fp16"}, {**scaler, "scale": float("nan")}, False),
        ({"amp": True, "amp_dtype": "fp16"}, {**scaler, "scale": torch.ones(1)}, False),
        ({"amp": False, "amp_dtype": "fp16"}, scaler, False),
    ):
        changed = {**state, "args": {**state["args"], **args}, "scaler": content}
        if whole:
            verification.check_full_state(tmp_path, changed)
            continue
        with pytest.raises(UserError, match="its 'scaler' is not the state of a gradient scaler"):
            verification.check_full_state(tmp_path, changed)


# Arguments


NOT_TYPED = [
    *[("lr", value) for value in ("0.1", -1.0, 0, float("nan"), float("inf"), True, None, [0.1])],
    *[("epochs", value) for value in (2.0, "2", 0, True, None)],
    *[("opt", value) for value in ("lamb", "SGD", 1, None, ["sgd"])],
    *[("amp", value) for value in (1, "True", None)],
    *[("mean", value) for value in (0.3, [], [0.3, "x"], [-1.0], (0.3,), None)],
    *[("model", value) for value in (None, 5, ["resnet50"])],
    *[("weights", value) for value in (5, True)],
    *[("seed", value) for value in (torch.zeros(3), {}, -1)],
    ("bad_images", "ignore"),
]


@pytest.mark.parametrize(("name", "value"), NOT_TYPED, ids=lambda value: str(value)[:30])
def test_arguments_that_no_flag_could_have_given(name, value):
    parser = PARSERS["_normal"]
    saved = vars(parse("_normal", "--finetune", "f", "--clip-grad-norm", 1, "--mean", 0.1, 0.2, 0.3, "--amp"))
    assert arguments.for_resume(parser, {}, saved, "f").mean == [0.1, 0.2, 0.3]
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=rf"^{flag}: run/f.pth says .*, which this flag does not accept") as caught:
        arguments.for_resume(parser, {}, {**saved, name: value}, "run/f.pth")
    assert "\n" not in str(caught.value)
    weights = arguments.for_weights(parser, {"finetune": "f"}, {**saved, name: value}, "f", test_only=False)
    assert getattr(weights, name) == parser.get_default(name) or name not in arguments.MODEL_FLAGS


def test_an_argument_whose_text_has_no_end_is_refused():
    doubled: list = []
    for _ in range(60):
        doubled = [doubled, doubled]
    with pytest.raises(UserError, match=r"^--seed: f says \[\[.*, which this flag does not accept") as caught:
        arguments.for_resume(PARSERS["_normal"], {}, {"seed": doubled}, "f")
    assert len(str(caught.value)) < 1000


def test_a_checkpoint_with_such_an_argument_is_refused(use, state, tmp_path):
    torch.save({**state, "args": {**state["args"], "batch_size": -8}}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"^--batch-size: .*bad.pth says -8, which this flag does not accept"):
        use("--resume", tmp_path / "bad.pth")
    use("--test-only", tmp_path / "bad.pth")  # where it has no say


def test_whole_numbers_of_other_code_are_taken_for_any_number():
    saved = {"sigma": 6, "mean": [1], "grid": 32.0, "kernel": True}
    args = arguments.for_weights(PARSERS["_policy_gradient"], {"resume": "f"}, saved, "f", test_only=False)
    assert (args.sigma, args.mean, args.grid, args.kernel) == (6, [1], 64, 13)
