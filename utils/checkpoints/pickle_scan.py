"""Check of a pickle before torch.load runs it: only instructions and calls that tensors and plain values need.

torch.load(weights_only=True) runs no foreign code, but a few bytes can still make it allocate gigabytes, hash nested
keys endlessly, or build tensors over memory that the file does not fill.
"""

import math
import pickletools
from collections.abc import Sequence
from reprlib import Repr
from types import NoneType
from typing import Any, BinaryIO

MOST_INSTRUCTIONS = 500_000  # enough for 14,000 tensors and their names
MOST_PENDING = 10_000  # values not yet in a container; torch.save has at most 2,000
MOST_DEEP = 100  # levels of nested dictionaries, lists and tuples
MOST_DIMENSIONS = 64  # as in torch
MOST_SHARED = 20  # all tensors together, relative to the file size; models whose layers share a tensor need 12
BYTES_A_CALL = 16  # of the file, per call; torch.save writes more than 30
KEYS = (str, int, float, bool, NoneType)
VALUES = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": "dict", "EMPTY_LIST": "list", "EMPTY_TUPLE": "tuple"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
ELEMENT_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}  # fmt: skip
STORAGES = {f"torch {name}" for name in ELEMENT_BYTES}
NAMES = STORAGES | {
    "collections OrderedDict", "collections Counter", "__builtin__ set", "_codecs encode", "argparse Namespace",
    "torch Size", "torch device", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    "torch float16", "torch bfloat16", "torch float32", "torch float64", "torch bool", "torch uint8", "torch int8",
    "torch int16", "torch int32", "torch int64",
}  # fmt: skip
OTHER_TENSORS = ("torch._utils _rebuild_", "torch._tensor _rebuild_")
_shown = Repr()
_shown.maxstring = _shown.maxother = 100


class Refused(Exception):
    """The file is refused. The message continues a sentence that begins with its path."""


class ForeignObject(Refused):
    """A pickled object other than tensors and plain values. The message names it and the nearest key."""


class Node:
    """A value that is not plain: its kind, its items (the keys of a dictionary) and the depth of their nesting."""

    __slots__ = ("depth", "items", "kind")

    def __init__(self, kind: str, items: Sequence[Any] = ()) -> None:
        self.kind, self.items, self.depth = kind, [], 0
        self.add(items)

    def add(self, items: Sequence[Any], values: Sequence[Any] = ()) -> None:
        """values: of a dictionary; its items are the keys."""
        self.items += items
        self.depth = max([self.depth, *(value.depth + 1 for value in (*items, *values) if isinstance(value, Node))])
        if self.depth > MOST_DEEP:
            raise Refused(f"its values are nested more than {MOST_DEEP} deep")


class Scan:
    """A pickle executed on descriptions of its values: a `Node` for each value that is not plain.

    value: the result; storages: by key, the number of elements that a storage must have, and the bytes per element.
    """

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        """Scan from the file's current position to the end of the pickle.

        Raises Refused for anything that torch.save does not write for tensors and plain values. Any other exception
        means that this is not a pickle, or a damaged one.
        """
        self.file_bytes = file_bytes
        self.storages: dict[str, tuple[int, int]] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below the marks
        self._memo: dict[int, Any] = {}
        self._calls = self._copied = self._tensor_bytes = 0
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number >= MOST_INSTRUCTIONS or len(self._stack) > MOST_PENDING:
                raise Refused("its pickle has more instructions or pending values than any of torch.save")
            self._step(opcode.name, argument)
        [self.value] = self._stack

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
            if len(self._below) > MOST_DEEP:
                raise Refused(f"its values are nested more than {MOST_DEEP} deep")
        elif name in EMPTY:
            stack.append(Node(EMPTY[name]))
        elif name == "TUPLE":
            items = self._pop_to_mark()
            self._stack.append(Node("tuple", items))
        elif name in TUPLES:
            items = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(Node("tuple", items[::-1]))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._pop_to_mark()
            _expect(self._stack[-1], "list")
            self._stack[-1].add(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._pop_to_mark()
            _expect(self._stack[-1], "dict", "ordered", "counter")
            self._check_keys(items[::2])
            self._stack[-1].add(items[::2], items[1::2])
        elif name == "GLOBAL":
            stack.append(self._find(argument))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            _expect(arguments, "tuple")
            stack.append(self._call(name, stack.pop(), arguments.items))
        elif name == "BUILD":
            self._build(stack.pop(), stack[-1])
        elif name != "STOP" and (name, argument) != ("PROTO", 2):
            raise ValueError(f"its pickle holds the instruction {name}, which torch.save never writes")

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _name(self) -> str:
        """The key of the current value, for messages: the text pushed last; "first entry" before any."""
        for stack in (self._stack, *reversed(self._below)):
            for value in reversed(stack):
                if isinstance(value, str):
                    return _shown.repr(value)
        return "first entry"

    def _check_keys(self, keys: Sequence[Any]) -> None:
        for key in keys:
            if not isinstance(key, KEYS) or (isinstance(key, int) and not -(2**63) <= key < 2**63):
                raise Refused(f"a dictionary near its {self._name()} has keys other than text and numbers")

    def _find(self, name: str) -> Node:
        if name in NAMES:
            return Node(name)
        if name.startswith(OTHER_TENSORS):
            raise Refused(f"its {self._name()} is not a dense tensor (but sparse, quantised or the like)")
        raise ForeignObject(f"{_shown.repr(name.replace(' ', '.'))} near its {self._name()}")

    def _storage(self, described: Any) -> Node:
        """The storage of one or more tensors: ("storage", kind, key, device, elements); the old format adds None."""
        _expect(described, "tuple")
        word, kind, key, device, count, *rest = described.items
        _expect(kind, *STORAGES)
        texts = [value for value in (key, device) if isinstance(value, str) and value.isascii()]
        if word != "storage" or len(texts) < 2 or not is_count(count) or rest not in ([], [None]):
            raise ValueError("its tensors refer to no storage")
        size = count, ELEMENT_BYTES[kind.kind.split()[1]]
        if self.storages.setdefault(key, size) != size:
            raise Refused(f"its {self._name()} claims another size for a storage than an earlier tensor")
        return Node("storage", size)

    def _call(self, instruction: str, function: Any, arguments: list[Any]) -> Node:
        """The result of a call. Raises Refused for calls that torch.save does not write."""
        name = function.kind if isinstance(function, Node) else "?"
        self._calls += 1
        if self._calls * BYTES_A_CALL > self.file_bytes:
            raise Refused("it calls functions more often than a file of its size needs")
        match instruction, name, arguments:
            case "NEWOBJ", "argparse Namespace", []:
                return Node("namespace")
            case "REDUCE", "collections OrderedDict", []:
                return Node("ordered")
            case "REDUCE", "collections Counter", [Node(kind="dict", items=keys)]:
                self._count_copied(len(keys))
                return Node("counter", keys)
            case "REDUCE", "__builtin__ set", [Node(kind="list", items=items)]:
                self._check_keys(items)
                self._count_copied(len(items))
                return Node("set")
            case "REDUCE", "_codecs encode", [str(text), "latin1"]:
                self._count_copied(len(text))
                return Node("bytes")
            case "REDUCE", "torch Size", [Node(kind="tuple", items=sizes)] if all(map(is_count, sizes)):
                self._count_copied(len(sizes))
                return Node("size")
            case "REDUCE", "torch device", [str()] | [str(), int()]:
                return Node("device")
            case "REDUCE", "torch._utils _rebuild_parameter", [Node(kind="tensor"), bool(), Node(kind="ordered")]:
                return Node("tensor")
            case "REDUCE", "torch._utils _rebuild_tensor_v2", [
                Node(kind="storage", items=storage),
                offset,
                Node(kind="tuple", items=sizes),
                Node(kind="tuple", items=strides),
                bool(),
                Node(kind="ordered"),
            ] if len(sizes) == len(strides) <= MOST_DIMENSIONS and all(map(is_count, [offset, *sizes, *strides])):
                self._check_tensor(*storage, offset, sizes, strides)
                return Node("tensor")
        raise Refused(f"its {self._name()} calls {name.replace(' ', '.')} in a way that torch.save never does")

    def _check_tensor(self, count: int, element_bytes: int, offset: int, sizes: list[int], strides: list[int]) -> None:
        """Raise Refused unless all elements lie in the storage, and the file is large enough for them."""
        elements = math.prod(sizes)
        self._tensor_bytes += elements * element_bytes
        if elements * element_bytes > self.file_bytes or self._tensor_bytes > MOST_SHARED * self.file_bytes:
            shape = tuple(sizes)
            raise Refused(
                f"its {self._name()} claims the shape {shape}: alone or with others, more than the file holds"
            )
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if offset > count or (elements > 0 and last >= count):
            raise Refused(f"its {self._name()} claims the shape {tuple(sizes)}, more than its storage holds")

    def _count_copied(self, count: int) -> None:
        self._copied += count
        if self._copied > self.file_bytes:
            raise Refused("it copies more values than a file of its size needs")

    def _build(self, state: Any, target: Any) -> None:
        """Set attributes: of a Namespace, or torch's version metadata of a state dict."""
        _expect(state, "dict")
        names = state.items
        if isinstance(target, Node) and target.kind == "namespace" and all(isinstance(name, str) for name in names):
            target.add((), [state])
        elif not (isinstance(target, Node) and target.kind == "ordered" and set(names) <= {"_metadata"}):
            raise Refused(f"its {self._name()} sets attributes of a value that has none")


def _expect(value: Any, *kinds: str) -> None:
    if not isinstance(value, Node) or value.kind not in kinds:
        raise ValueError(f"its pickle lacks a {kinds[0]}")


def is_count(value: Any) -> bool:
    """Whether this is a whole number that torch takes as a count."""
    return type(value) is int and 0 <= value < 2**63
