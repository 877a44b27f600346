"""Checkpoints that appear whole or not at all, are never unpickled, and every format of weights that is accepted."""

import argparse
import errno
import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.conftest import MakesAFolder
from tests.helpers.states import CLASSES, assert_equal_states, network
from utils.checkpoints.checkpoint import (
    CHECKPOINT,
    PREVIOUS,
    clean_keys,
    read,
    read_checkpoint,
    read_weights,
    safetensors_bytes,
    save,
    save_checkpoint,
    weights_state,
)
from utils.runtime.errors import UserError
from utils.runtime.progress import Position
from utils.training.meters import RunningMean
from utils.training.optim import MovingAverage, build_optimizer, parameter_groups
from utils.training.saver import Saver
from utils.training.state import TrainingState, restore_rng_state, rng_states
from utils.training.update import GuardedUpdate

CPU = torch.device("cpu")


def small_state() -> dict:
    return {"a": torch.arange(4.0), "n": 1}


def as_bytes(state: object, **settings) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **settings)
    return buffer.getvalue()


# Writing


def test_what_was_saved_is_read(tmp_path):
    state = {
        "numbers": {"int": 3, "float": 0.1, "bool": True, "none": None, "text": "ü"},
        "list": [1, ["a", "b"], (2, 3)],
        "float32": torch.randn(3, 4),
        "bfloat16": torch.randn(3).bfloat16(),
        "int64": torch.tensor(7),
        "uint8": torch.get_rng_state(),
    }
    save(tmp_path / "state.pth", state)
    found = read(tmp_path / "state.pth")
    assert found["numbers"] == state["numbers"]
    assert found["list"] == state["list"]
    tensors = ("float32", "bfloat16", "int64", "uint8")
    assert_equal_states({key: found[key] for key in tensors}, {key: state[key] for key in tensors})
    assert torch.load(tmp_path / "state.pth", weights_only=True)["list"] == state["list"]
    assert os.listdir(tmp_path) == ["state.pth"]


def test_the_checkpoint_before_is_kept(tmp_path):
    for epoch in range(4):
        save_checkpoint(tmp_path, {"epoch": epoch})
        assert read(tmp_path / CHECKPOINT) == {"epoch": epoch}
        if epoch > 0:
            assert read(tmp_path / PREVIOUS) == {"epoch": epoch - 1}
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, PREVIOUS]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refuse_with_full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_a_little_then_refuse():
    """An os.write for a disk with room for 100 bytes more."""
    real_write, room = os.write, [100]

    def write(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            refuse_with_full_disk()
        written = real_write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    return write


@pytest.mark.parametrize("function", ["open", "write", "fsync", "replace"])
def test_a_full_disk_harms_nothing(tmp_path, monkeypatch, function):
    path = tmp_path / "state.pth"
    save(path, small_state())
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, write_a_little_then_refuse() if function == "write" else refuse_with_full_disk)
        with pytest.raises(UserError) as caught:
            save(path, {"other": torch.zeros(100)})
    assert str(caught.value).startswith(f"{path}: cannot be written (No space left on device)")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("function", ["write", "replace"])
def test_a_full_disk_harms_no_checkpoint(tmp_path, monkeypatch, function):
    for epoch in range(2):
        save_checkpoint(tmp_path, {"epoch": epoch})
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse_with_full_disk)
        with pytest.raises(UserError, match="No space left on device"):
            save_checkpoint(tmp_path, {"epoch": 2})
    assert read(tmp_path / CHECKPOINT) == {"epoch": 1}
    assert read(tmp_path / PREVIOUS)["epoch"] in (0, 1)
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, PREVIOUS]


def test_the_save_after_a_failed_one_leaves_no_temporary_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"epoch": 0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse_with_full_disk)
        with pytest.raises(UserError):
            save_checkpoint(tmp_path, {"epoch": 1})
    assert (tmp_path / CHECKPOINT).samefile(tmp_path / PREVIOUS)  # the failed save came as far as this
    save_checkpoint(tmp_path, {"epoch": 2})
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, PREVIOUS]
    assert read(tmp_path / CHECKPOINT) == {"epoch": 2}
    assert read(tmp_path / PREVIOUS) == {"epoch": 0}


def test_rotation_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    for epoch in range(3):
        save_checkpoint(tmp_path, {"epoch": epoch})
    assert read(tmp_path / CHECKPOINT) == {"epoch": 2}
    assert read(tmp_path / PREVIOUS) == {"epoch": 1}
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, PREVIOUS]


def test_short_writes_still_give_the_whole_file(tmp_path, monkeypatch):
    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:7]))
        save(tmp_path / "state.pth", small_state())
    assert (tmp_path / "state.pth").read_bytes() == as_bytes(small_state())


def test_the_file_is_on_the_disk_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    path, events = tmp_path / "state.pth", []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(("replace", Path(source), Path(target)))
        real_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        save(path, small_state())
    temporary = events[0][1]
    assert temporary.parent == tmp_path
    assert events == [("fsync", temporary), ("replace", temporary, path), ("fsync", tmp_path)]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "absent" / "state.pth"
    with pytest.raises(UserError) as caught:
        save(path, small_state())
    assert str(caught.value).startswith(f"{path}: cannot be written (No such file or directory)")


# Damaged files and files that are none


def is_small_state(state: dict) -> bool:
    return state.keys() == {"a", "n"} and torch.equal(state["a"], torch.arange(4.0)) and state["n"] == 1


def test_a_damaged_byte_in_a_tensor_is_found(tmp_path):
    path = tmp_path / "state.pth"
    content = bytearray(as_bytes({"a": torch.full((64,), 1.5)}))
    place = content.index(torch.full((64,), 1.5).numpy().tobytes()) + 100
    content[place] ^= 0x04
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: not a checkpoint, or damaged (Bad CRC-32 for file")


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_any_damaged_byte_is_found_or_without_effect(tmp_path, flip):
    path, whole, found = tmp_path / "state.pth", as_bytes(small_state()), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        try:
            state = read(path)
        except UserError as error:
            assert str(path) in str(error)
            found += 1
        else:
            assert is_small_state(state), place
    assert found > len(whole) / 3  # the rest is padding, dates and the like


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "torch's old format"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, zipped):
    path, whole = tmp_path / "state.pth", as_bytes(small_state(), _use_new_zipfile_serialization=zipped)
    path.write_bytes(whole)
    assert is_small_state(read(path))
    for length in range(0, len(whole), 1 + 2 * zipped):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"state\.pth"):
            read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"This is text.\n",
        b"epoch,loss\n0,1.5\n",
        b'{"epoch": 0}\n',
        b"<html><body>404 Not Found</body></html>\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"\x80",
        b"\x80\x02",
        b"PK\x03\x04",
        bytes(range(256)) * 4,
        pickle.dumps({"a": 1}, protocol=4),
    ],
)
def test_a_file_that_is_no_checkpoint_is_called_so(tmp_path, content):
    path = tmp_path / "notes.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: not a checkpoint")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    reasons = {"absent.pth": "no such file.", ".": "not a regular file; expected a checkpoint or weights."}
    for name, reason in reasons.items():
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {reason}"


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list; expected a dictionary of weights"):
        read(tmp_path / "list.pth")


# Files that would run code


@pytest.mark.parametrize(
    "write",
    [
        lambda state: as_bytes(state),
        lambda state: as_bytes(state, _use_new_zipfile_serialization=False),
        lambda state: pickle.dumps(state, protocol=2),
    ],
    ids=["zip", "torch's old format", "plain pickle"],
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path, write):
    control, marker = tmp_path / "control", tmp_path / "marker"
    pickle.loads(pickle.dumps(MakesAFolder(control)))
    assert control.exists()  # so the marker would be, if it were unpickled

    path = tmp_path / "evil.pth"
    path.write_bytes(write({"model": {"a": torch.zeros(2)}, "args": MakesAFolder(marker)}))
    for reader in (read, read_weights):
        with pytest.raises(UserError) as caught:
            reader(path)
        assert "could run code when read; refused" in str(caught.value)
        assert str(caught.value).startswith(f"{path}: ")
    assert not marker.exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(network(), tmp_path / "module.pth")
    with pytest.raises(UserError, match="beyond tensors and plain values"):
        read_weights(tmp_path / "module.pth")


def test_the_one_class_allowed_is_allowed_only_while_reading(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1)}, tmp_path / "args.pth")
    assert read(tmp_path / "args.pth")["args"].lr == 0.1
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "args.pth", weights_only=True)


# Full states


def training_state(script: str = "_normal", **more: nn.Module) -> dict:
    """What a run's saver writes; `more`: further modules by the name of their entry."""
    model = network()
    update = GuardedUpdate({"classifier": build_optimizer("sgd", parameter_groups(model, 1e-4), 0.1, 0.9)}, CPU)
    training = TrainingState({"model": model, **more}, update, RunningMean(CPU))
    saver = Saver(
        Path(),
        training,
        origin={"script": script, "classes": CLASSES, "train_images": 50, "args": {"model": "small", "mean": (0.3,)}},
        start=Position(3, 5, 40, 1.5),
        best_f1=0.5,
        checkpoint_steps=None,
    )
    return saver._state()


def test_a_full_state_goes_through_its_file(tmp_path):
    state = training_state(policy_net=network(1))
    save_checkpoint(tmp_path, state)
    found = read_checkpoint(tmp_path / CHECKPOINT, "_normal")
    plain = ("format_version", "script", "epoch", "step", "images", "seconds", "best_f1", "classes", "args")
    assert {key: found[key] for key in plain} == {
        "format_version": 1,
        "script": "_normal",
        "epoch": 3,
        "step": 5,
        "images": 40,
        "seconds": 1.5,
        "best_f1": 0.5,
        "classes": CLASSES,
        "args": {"model": "small", "mean": (0.3,)},
    }
    assert_equal_states(found["model"], network().state_dict())
    assert_equal_states(found["policy_net"], network(1).state_dict())
    assert found.keys() == state.keys()
    assert found["optimizers"]["classifier"]["param_groups"][0]["weight_decay"] == 1e-4


def test_random_numbers_go_on_from_the_checkpoint():
    torch.manual_seed(3)
    torch.rand(5)
    states = rng_states()
    expected = torch.rand(4)
    torch.manual_seed(9)
    restore_rng_state(states)
    assert torch.equal(torch.rand(4), expected)


def test_weights_alone_are_no_state_to_resume_from(tmp_path):
    path = tmp_path / "model_89.pth"
    save(path, weights_state(network(), CLASSES, {}))
    with pytest.raises(UserError, match=r"no full training state.*--finetune") as caught:
        read_checkpoint(path, "_normal")
    assert str(path) in str(caught.value)


def test_a_checkpoint_of_the_other_script_is_refused(tmp_path):
    save(tmp_path / CHECKPOINT, training_state("_policy_gradient"))
    with pytest.raises(UserError, match=r"checkpoint of _policy_gradient/train\.py, and this is _normal/train\.py"):
        read_checkpoint(tmp_path / CHECKPOINT, "_normal")


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path):
    save(tmp_path / CHECKPOINT, {**training_state(), "format_version": 2})
    with pytest.raises(UserError, match=r"written by a newer version \(format 2, known up to 1\)"):
        read_checkpoint(tmp_path / CHECKPOINT, "_normal")


# Weights in every accepted format


def test_weights_of_our_own_files(tmp_path):
    save(tmp_path / "model_2.pth", weights_state(network(), CLASSES, {"model": "small"}))
    found = read_weights(tmp_path / "model_2.pth")
    assert_equal_states(found.model, network().state_dict())
    assert (found.classes, found.args) == (CLASSES, {"model": "small"})
    assert found.policy_net is None
    assert found.path == str(tmp_path / "model_2.pth")


def test_weights_of_a_full_state_with_a_policy(tmp_path):
    save(tmp_path / CHECKPOINT, training_state("_policy_gradient", policy_net=network(1)))
    found = read_weights(tmp_path / CHECKPOINT)
    assert_equal_states(found.model, network().state_dict())
    assert_equal_states(found.policy_net, network(1).state_dict())


def test_weights_of_a_full_state_with_a_moving_average_are_the_averaged_ones(tmp_path):
    average = MovingAverage(network(1), 0.9, 1, epochs=1, global_batch=1)
    save(tmp_path / CHECKPOINT, {**training_state(), **average.state()})
    assert_equal_states(read_weights(tmp_path / CHECKPOINT).model, network(1).state_dict())


def authors_state(prefix: str = "_orig_mod.", **more) -> dict:
    """As the authors' code leaves it: prefixed keys, integer buffers averaged to floats, args as a Namespace."""
    model = {
        f"{prefix}{key}": value if value.is_floating_point() else value.float()
        for key, value in network().state_dict().items()
    }
    args = argparse.Namespace(model="resnet50", num_classes=2, lr=0.1, device="cuda", weights=None)
    return {
        "model": model,
        "optimizer": {"state": {}},
        "lr_scheduler": {"last_epoch": 89},
        "epoch": 89,
        "args": args,
        **more,
    }


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_of_the_authors_files(tmp_path, prefix):
    torch.save(authors_state(prefix), tmp_path / "RIN.pth")
    found = read_weights(tmp_path / "RIN.pth")
    assert found.args == {"model": "resnet50", "num_classes": 2, "lr": 0.1, "device": "cuda", "weights": None}
    assert (found.classes, found.policy_net) == (None, None)
    assert list(found.model) == list(network().state_dict())
    restored = network(1)
    restored.load_state_dict(found.model)
    assert_equal_states(restored.state_dict(), network().state_dict())  # the counter is an integer again


def test_weights_of_torchvisions_moving_average(tmp_path):
    averaged = {f"module.{key}": value for key, value in network(1).state_dict().items()}
    torch.save(authors_state(model_ema={"n_averaged": torch.tensor(5), **averaged}), tmp_path / "ema.pth")
    assert_equal_states(read_weights(tmp_path / "ema.pth").model, network(1).state_dict())


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_weights_of_a_bare_state_dict(tmp_path, kind):
    torch.save(kind(network().state_dict()), tmp_path / "bare.pth")
    found = read_weights(tmp_path / "bare.pth")
    assert_equal_states(found.model, network().state_dict())
    assert (found.classes, found.args, found.policy_net) == (None, {}, None)


def test_weights_of_torchs_old_format(tmp_path):
    torch.save(network().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal_states(read_weights(tmp_path / "old.pth").model, network().state_dict())


def test_weights_of_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(network().state_dict(), path)
    found = read_weights(path)
    assert_equal_states({key: found.model[key] for key in network().state_dict()}, network().state_dict())
    assert (found.classes, found.args) == (None, {})
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:20], whole[:-3]):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_weights(path)
        assert str(caught.value).startswith(f"{path}: not a checkpoint, or damaged (")


def test_safetensors_of_ours_say_what_a_pth_says(tmp_path):
    """Shared tensors are written twice, and a tensor's own layout does not matter."""
    model = network()
    model.tied = model[0]
    model[2].weight = nn.Parameter(torch.randn(4, 2).t())
    args = {"model": "small", "mean": [0.3], "lr": 0.1, "gray": True, "weights": None}
    classes = ["\udce9", "dark"]
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(model, classes, args))
    found = read_weights(tmp_path / "a.safetensors")
    assert_equal_states({key: found.model[key] for key in model.state_dict()}, model.state_dict())
    assert (found.classes, found.args, found.policy_net) == (classes, args, None)
    assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == model.state_dict().keys()


def test_safetensors_of_others_may_say_what_they_want(tmp_path):
    for metadata in ({"format": "pt"}, {"classes": "[1]", "args": "{"}):
        safetensors.torch.save_file(network().state_dict(), tmp_path / "b.safetensors", metadata)
        found = read_weights(tmp_path / "b.safetensors")
        assert (found.classes, found.args) == (None, {})


@pytest.mark.parametrize(
    "state", [{}, {"model": {}}, {"model": {"a": 1}}, {"epoch": 3}, {"a": torch.zeros(1), "b": "text"}]
)
def test_a_dictionary_without_weights_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "none.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read_weights(tmp_path / "none.pth")


def test_clean_keys_takes_prefixes_off_the_front_only():
    keys = ["module.a", "_orig_mod.a.b", "module._orig_mod.module.c", "body.module.d", "modules.e"]
    assert list(clean_keys(dict.fromkeys(keys, torch.zeros(1)))) == ["a", "a.b", "c", "body.module.d", "modules.e"]
