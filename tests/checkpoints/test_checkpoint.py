"""Checkpoints appear whole or not at all, and damaged files are refused."""

import argparse
import errno
import io
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import assert_same
from tests.helpers.states import CLASSES, as_bytes, network, training_state
from utils.checkpoints.checkpoint import (
    CHECKPOINT,
    PREVIOUS,
    read,
    read_checkpoint,
    save,
    save_checkpoint,
    stage,
    weights_of,
    weights_state,
)
from utils.runtime.errors import UserError
from utils.runtime.files import stream_atomically


def small_state() -> dict:
    return {"a": torch.arange(4.0), "n": 1}


# Writing


def test_saved_values_are_read_back(tmp_path):
    state = {
        "plain": [3, 0.1, True, None, "ü", ["a"], (2, 3)],
        "tensor": torch.randn(3, 4),
        "rng": torch.get_rng_state(),
    }
    save(tmp_path / "state.pth", state)
    assert_same(read(tmp_path / "state.pth"), state)
    assert_same(torch.load(tmp_path / "state.pth", weights_only=True), state)
    assert os.listdir(tmp_path) == ["state.pth"]


def test_a_staged_state_is_an_equal_copy_of_its_own():
    live = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    network_state = network().state_dict()
    state = {
        "live": live,
        "tied": [live.view_as(live), (live[0], 7)],
        "model": network_state,
        "args": {"mean": [0.3], "name": None},
        "empty": torch.zeros(0, 3),
        "counts": Counter(a=2),
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(7),
    }
    expected = torch.load(io.BytesIO(as_bytes(state)), weights_only=True)
    staged = stage(state)
    live.zero_()
    state["args"]["mean"].append(0.4)
    for value in network_state.values():
        value.zero_()
    assert_same(staged, expected)
    assert staged["live"].stride() == live.stride()
    assert staged["tied"][0].data_ptr() == staged["live"].data_ptr()
    assert staged["model"]._metadata == network_state._metadata
    assert staged["model"]._metadata


def test_weights_of_a_full_state_are_contiguous_and_have_its_average():
    state = training_state()
    average = {"0.weight": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    weights = weights_of({**state, "model_ema": average})
    assert list(weights) == ["format_version", "model", "model_ema", "classes", "args"]
    assert_same(dict(weights["model"]), dict(state["model"]))
    assert_same(weights["model_ema"], average)
    assert weights["model_ema"]["0.weight"].is_contiguous()
    assert list(weights_of(state)) == ["format_version", "model", "classes", "args"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refuse_with_full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["open", "write", "fsync", "replace"])
def test_a_full_disk_harms_nothing(tmp_path, monkeypatch, function):
    path = tmp_path / "state.pth"
    save(path, small_state())
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse_with_full_disk)
        with pytest.raises(UserError) as caught:
            save(path, {"other": torch.zeros(100)})
    assert str(caught.value).startswith(f"{path}: cannot be written (No space left on device)")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("room", [500_000, 1_048_576, 1_500_000, 2_000_000])
def test_a_disk_that_fills_up_during_a_save_gives_the_same_error(tmp_path, monkeypatch, room):
    left, real_write = room, os.write

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal left
        if left == 0:
            refuse_with_full_disk()
        written = real_write(descriptor, data[:left])
        left -= written
        return written

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        save(tmp_path / "state.pth", {"a": torch.zeros(300_000), "b": torch.zeros(300_000)})
    assert os.listdir(tmp_path) == []


def test_a_forked_process_holds_no_file_that_was_being_written(tmp_path):
    def fork(file: io.BufferedWriter) -> None:
        file.write(b"before")
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                os.write(writer, os.readlink(f"/proc/self/fd/{file.fileno()}").encode())
                file.flush()  # goes nowhere
            finally:
                os._exit(0)
        os.waitpid(process, 0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert pipe.read() == b"/dev/null"
        file.write(b" and after")

    stream_atomically(tmp_path / "file", fork)
    assert (tmp_path / "file").read_bytes() == b"before and after"


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
    save_checkpoint(tmp_path, {"epoch": 3})  # also where the failed save left both names on one file
    assert [read(tmp_path / name)["epoch"] for name in (CHECKPOINT, PREVIOUS)] == [3, 1]
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, PREVIOUS]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:7]))
        save(tmp_path / "state.pth", small_state())
    assert (tmp_path / "state.pth").read_bytes() == as_bytes(small_state())


def test_a_file_is_synced_before_its_rename_and_the_folder_after_it(tmp_path, monkeypatch):
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


# Damaged files, and other files


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


@pytest.mark.slow
def test_any_damaged_byte_is_found_or_without_effect(tmp_path):
    path, whole, refused = tmp_path / "state.pth", as_bytes(small_state()), 0
    path.write_bytes(whole)
    with path.open("r+b", buffering=0) as file:  # much faster than a new file for each byte
        for place, byte in enumerate(whole):
            for damaged in (byte ^ 0x01, byte ^ 0xFF):
                os.pwrite(file.fileno(), bytes([damaged]), place)
                try:
                    assert is_small_state(read(path)), place
                except UserError as error:
                    assert str(path) in str(error)
                    refused += 1
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert refused > 2 * len(whole) / 3  # the rest is padding, dates and the like


@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, old_format):
    path, whole = tmp_path / "state.pth", as_bytes(small_state(), old_format)
    path.write_bytes(whole)
    assert is_small_state(read(path))
    for length in range(len(whole) - 1, -1, -3):
        os.truncate(path, length)
        with pytest.raises(UserError, match=r"state\.pth"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"\x80\x02",
        b"PK\x03\x04",
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, content):
    path = tmp_path / "notes.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: not a checkpoint")
    assert "\n" not in str(caught.value)


def test_a_list_is_not_a_checkpoint(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list; expected a dictionary of weights"):
        read(tmp_path / "list.pth")


def test_namespaces_are_allowed_only_while_reading(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1)}, tmp_path / "args.pth")
    assert read(tmp_path / "args.pth")["args"].lr == 0.1
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "args.pth", weights_only=True)


# Full states


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: weights_state(network(), CLASSES, {}), "no full training state.*--finetune"),
        (
            lambda: training_state("_policy_gradient"),
            r"checkpoint of _policy_gradient/train\.py, and this is _normal/train\.py",
        ),
        (lambda: {**training_state(), "format_version": 2}, r"by a newer version \(format 2, known up to 1\)"),
    ],
    ids=["weights", "other script", "newer format"],
)
def test_other_states_are_refused_for_resuming(tmp_path, make, match):
    path = tmp_path / CHECKPOINT
    save(path, make())
    with pytest.raises(UserError, match=match) as caught:
        read_checkpoint(path, "_normal")
    assert str(path) in str(caught.value)
