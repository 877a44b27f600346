"""Pickles that allocate, loop or lie are refused at once; every file that torch.save writes is read."""

import argparse
import io
import pickle
import resource
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.ranks import call_warm
from tests.helpers.runs import assert_same
from tests.helpers.states import as_bytes
from utils.checkpoints.checkpoint import METADATA, read, read_weights
from utils.runtime.errors import UserError


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def function(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def state(value: bytes) -> bytes:
    """A dictionary of one entry."""
    return b"\x80\x02}" + text("fc.weight") + value + b"s."


def storage(count: int) -> bytes:
    return b"(" + text("storage") + function("torch FloatStorage") + text("0") + text("cpu") + number(count) + b"tQ"


def tensor(
    count: int, offset: int, sizes: bytes, strides: bytes, hooks: bytes = b"ccollections\nOrderedDict\n)R"
) -> bytes:
    rebuild = function("torch._utils _rebuild_tensor_v2")
    return rebuild + b"(" + storage(count) + number(offset) + sizes + strides + b"\x89" + hooks + b"tR"


def zipped(pickled: bytes, **records: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(name if "/" in name else f"archive/{name}", content)
    return buffer.getvalue()


FOUR = {"archive/data/0": bytes(16)}
FOREIGN, NEVER = "holds pickled objects beyond tensors", "in a way that torch.save never does"
MORE, STORAGE = "more than the file holds", "more than its storage holds"
DENSE = "'fc.weight' is not a dense tensor"
DAMAGED = "not a checkpoint, or damaged"
OLD = as_bytes({"w": torch.arange(4.0)}, old_format=True)
NESTED = b"".join(b"ah" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
GIANT = b"\x8a\x08" + struct.pack("<q", 10**10)
ONE_CALL = function("collections OrderedDict") + b"q\0"
HOSTILE = {
    # keys
    "nested tuple as a key": (zipped(b"\x80\x02])q\0" + NESTED + b"a}h\x3cNs."), "keys other than text and numbers"),
    "colliding numbers as keys": (zipped(b"\x80\x02}" + number(2**61 - 1 << 9) + b"Ns."), "keys other than"),
    "set of lists": (zipped(state(function("__builtin__ set") + b"]]a\x85R")), "keys other than"),
    # allocation
    "bytearray": (zipped(state(function("__builtin__ bytearray") + GIANT + b"\x85R")), FOREIGN),
    "storage class": (zipped(state(function("torch ByteStorage") + GIANT + b"\x85R")), NEVER),
    "counter of a number": (zipped(state(function("collections Counter") + b"K\5\x85R")), NEVER),
    "encoding": (zipped(state(function("_codecs encode") + text("a") + text("idna") + b"\x86R")), NEVER),
    "encoded often": (
        zipped(state(b"(" + function("_codecs encode") + b"q\0" + text("a" * 9000) + text("latin1") + b"\x86q\1R"
               + b"h\0h\1R" * 400 + b"t")),
        "it copies more values than a file of its size needs",
    ),
    "called often": (zipped(state(ONE_CALL + b"(" + b"h\0)R" * 3000 + b"t")), "calls functions more often"),
    "many values": (zipped(b"\x80\x02" + b"}" * 300_000 + b"."), "pending values"),
    "many instructions": (zipped(b"\x80\x02]q\0" + b"]a" * 260_000 + b"."), "more instructions"),
    "deep": (zipped(state(b"]" * 5000 + b"a" * 4999)), "nested more than 100 deep"),
    "deep marks": (zipped(state(b"(" * 5000 + b"t" * 5000)), "nested more than 100 deep"),
    # instructions that torch.save never writes
    "text of 4 GB": (zipped(b"\x80\x02X\xff\xff\xff\xff" + b"a."), DAMAGED),
    "long number": (zipped(state(b"\x8b" + struct.pack("<i", 10**6) + b"\1" * 10**6)), "the instruction LONG4"),
    "long number as text": (zipped(state(b"L" + b"9" * 10**6 + b"L\n")), DAMAGED),
    "copies": (zipped(b"\x80\x02]" + b"2" * 1000 + b"."), "the instruction DUP"),
    "newer pickle": (zipped(pickle.dumps({"a": 1}, 4)), "the instruction PROTO"),
    "cut": (zipped(b"\x80\x02}"), DAMAGED),
    # attributes
    "attributes of a dictionary": (
        zipped(state(function("collections OrderedDict") + b")R}" + text("items") + b"K\1sb")),
        "sets attributes of",
    ),
    "attributes of a class": (zipped(state(function("argparse Namespace") + b"}b")), "sets attributes of"),
    # tensors
    "beyond its storage": (zipped(state(tensor(4, 0, numbers(2, 4), numbers(1, 1))), **FOUR), STORAGE),
    "empty, far beyond": (zipped(state(tensor(4, 2**40, numbers(0), numbers(1))), **FOUR), STORAGE),
    "expanded": (zipped(state(tensor(4, 0, numbers(10**6, 10**6), numbers(0, 0))), **FOUR), MORE),
    "negative stride": (zipped(state(tensor(4, 3, numbers(2), numbers(-1))), **FOUR), NEVER),
    "strides missing": (zipped(state(tensor(4, 0, numbers(2), b")")), **FOUR), NEVER),
    "hooks": (zipped(state(tensor(4, 0, numbers(2), numbers(1), b"}")), **FOUR), NEVER),
    "storage that is too small": (
        zipped(state(tensor(10**9, 0, numbers(2), numbers(1))), **FOUR),
        "claim 4000000000 bytes of data/0, which it does not",
    ),
    "storage of two sizes": (
        zipped(state(storage(4) + storage(400) + b"\x86"), **FOUR),
        "claims another size for a storage than an earlier tensor",
    ),
    "storage of another word": (zipped(state(storage(4).replace(b"storage", b"modules"))), DAMAGED),
    "sparse": (zipped(state(function("torch._utils _rebuild_sparse_tensor") + b")R")), DENSE),
    "with attributes": (zipped(state(function("torch._tensor _rebuild_from_type_v2") + b")R")), DENSE),
    "views of one storage": (
        zipped(b"\x80\x02}(" + b"".join(text(str(n)) + tensor(4000, 0, numbers(4000), numbers(1)) for n in range(300))
               + b"u.", **{"archive/data/0": bytes(16_000)}),
        "alone or with others, more than the file holds",
    ),
    # records
    "record outside": (zipped(state(b"K\1"), **{"archive/../../x": b"x"}), "torch.save writes no record"),
    "record of another folder": (zipped(state(b"K\1"), **{"other/data.pkl": b"x"}), "torch.save writes no record"),
    "no pickle": (zipped(b"").replace(b"data.pkl", b"data.pk_"), DAMAGED),
    # no file of torch.save
    "safetensors": (struct.pack("<Q", 2) + b"{}", "the name of a safetensors file ends in .safetensors"),
    "plain pickle of code": (b"\x80\x02" + function("os system") + b".", "it is not a file of torch.save"),
    # the old format
    "old, nothing filled": (OLD[: OLD.rindex(b"\x80\x02")] + pickle.dumps([], 2), "the storages it lists are not"),
    "old, cut": (OLD[:-1], "holds fewer or more values"),
    "old, another count": (OLD[:-24] + struct.pack("<q", 10**10) + OLD[-16:], "a storage has another size"),
}  # fmt: skip


def header(entries: str, data: bytes = bytes(16)) -> bytes:
    """A file whose header holds these entries, as JSON without the outer braces."""
    return struct.pack("<Q", len(entries) + 2) + b"{" + entries.encode() + b"}" + data


ENTRY = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
SAFETENSORS = {
    "long header": struct.pack("<Q", 2**62) + b"{}",
    "deep header": header('"a":' + "[" * 100_000),
    "overlapping": header(ENTRY + "," + ENTRY.replace('"a"', '"b"')),
    "a shape that overflows": header(ENTRY.replace("[4]", "[4294967296,4294967296,4]")),
    "many tensors": header(
        ",".join(f'"{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(20_001)), b""
    ),
    "many lists": header(f'"__metadata__":{{"{METADATA}":"{"[]," * 100_001}"}},' + ENTRY),
}


def messages_within(megabytes: int, paths: list[str]) -> list[str]:
    """The errors for these files, in a process that may take this much more memory than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 1_000_000, -1))
    messages = []
    for path in paths:
        try:
            read(path)
            messages.append(f"{path} was read")
        except UserError as error:
            messages.append(str(error))
    return messages


@pytest.mark.slow
def test_hostile_files_are_refused_within_a_few_megabytes(tmp_path):
    files = {f"{name}.pth": file for name, file in HOSTILE.items()}
    files |= {f"{name}.safetensors": (content, DAMAGED) for name, content in SAFETENSORS.items()}
    paths = [str(tmp_path / name) for name in files]
    for path, (content, _) in zip(paths, files.values(), strict=True):
        Path(path).write_bytes(content)
        assert len(content) < 2_000_000
    messages = call_warm(messages_within, 100, paths)
    for message, path, (_, match) in zip(messages, paths, files.values(), strict=True):
        assert message.startswith(f"{path}: ")
        assert match in message
        assert len(message) < 500


def test_the_parts_of_the_hostile_pickles_make_a_valid_file(tmp_path):
    """Without this the refusals would prove nothing."""
    path = tmp_path / "good.pth"
    content = struct.pack("<4f", 0, 1, 2, 3)
    path.write_bytes(zipped(state(tensor(4, 1, numbers(3), numbers(1))), **{"archive/data/0": content}))
    assert read(path)["fc.weight"].tolist() == [1, 2, 3]
    path.write_bytes(OLD)
    assert read(path)["w"].tolist() == [0, 1, 2, 3]
    path = tmp_path / "good.safetensors"
    path.write_bytes(header(ENTRY, content))
    assert read(path)["a"].tolist() == [0, 1, 2, 3]


def test_a_pickle_that_contains_itself_does_not_hang(tmp_path):
    circle: list = []
    circle.append(circle)
    doubled: list = [torch.zeros(1)]
    for _ in range(60):
        doubled = [doubled, doubled]
    torch.save({"model": {"a": torch.ones(2)}, "args": {"x": circle, "y": doubled, "lr": 0.1}}, tmp_path / "deep.pth")
    assert read_weights(tmp_path / "deep.pth").args == {"lr": 0.1}


# Files of torch.save


def trained(optimizer: type[torch.optim.Optimizer], **options) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    stepper = optimizer(model.parameters(), lr=0.1, **options)
    schedule = torch.optim.lr_scheduler.MultiStepLR(stepper, [3, 5])  # which holds a Counter
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    stepper.step()
    schedule.step()
    return {"model": model.state_dict(), "optimizer": stepper.state_dict(), "lr_scheduler": schedule.state_dict()}


WHOLE = torch.arange(24.0)
SAVED = {
    "optimisers": {"all": [
        trained(torch.optim.SGD, momentum=0.9), trained(torch.optim.AdamW), trained(torch.optim.RMSprop, momentum=0.9)
    ]},
    "torchvision": {
        **trained(torch.optim.SGD),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, clip_grad_norm=None, model="resnet18", ra_sampler=False, mean=[0.1, 0.2]),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    },
    "timm": {"epoch": 1, "arch": "resnet18", "state_dict": {"fc.bias": WHOLE}, "version": 2, "metric": 71.5},
    "lightning": {
        "state_dict": OrderedDict({"model.fc.bias": WHOLE}),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "best_k_models": {}}},
        "hyper_parameters": {"size": torch.Size([3, 4]), "device": torch.device("cpu"), "kinds": {"a", "b"}},
        "milestones": Counter([3, 3, 5]),
    },
    "kinds": {kind: WHOLE.to(getattr(torch, kind)) for kind in (
        "float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")},
    "views": {"part": WHOLE[4:9], "turned": WHOLE.view(4, 6).T, "whole": WHOLE, "none": torch.zeros(0, 3),
              "number": torch.tensor(7), "spread": torch.ones(1).expand(3), "last": torch.zeros(2, 3, 4, 4).to(
                  memory_format=torch.channels_last)},
    "values": {"bytes": b"\0\xff", "long": 2**64 - 1, "negative": -5, "none": None, "pair": (1, "a"), 5: 0.5,
               "float": 1e300, "empty": ((), [], {}, ""), "text": "ü\ud800", "kind": torch.float16},
    "parameters": {"weight": nn.Parameter(torch.ones(3)), "buffer": nn.Parameter(torch.ones(2), requires_grad=False)},
}  # fmt: skip


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kind", SAVED)
def test_every_plain_state_that_torch_saves_is_read(tmp_path, kind, old_format):
    (tmp_path / "file.pth").write_bytes(as_bytes(SAVED[kind], old_format))
    assert_same(read(tmp_path / "file.pth"), SAVED[kind])


@pytest.mark.slow
def test_large_states_stay_far_below_the_limits(tmp_path):
    many = {f"blocks.{number}.mlp.fc1.weight": torch.zeros(1) for number in range(3000)}
    state = {"model": many, "classes": [f"class {number}" for number in range(20_000)]}
    torch.save(state, tmp_path / "large.pth")
    loaded = read(tmp_path / "large.pth")
    assert (len(loaded["model"]), len(loaded["classes"])) == (3000, 20_000)


def test_version_metadata_of_a_state_dict_is_ignored(tmp_path):
    model = nn.Linear(2, 2)
    weights = model.state_dict()
    weights._metadata = 5
    torch.save({"model": weights}, tmp_path / "odd.pth")
    loaded = read_weights(tmp_path / "odd.pth").model
    assert read(tmp_path / "odd.pth")["model"].__dict__ == {}
    model.load_state_dict(loaded)
