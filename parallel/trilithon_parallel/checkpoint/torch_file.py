"""
The tensors of a file that `torch.save` wrote, read as data: nothing in the file is run, imported or looked up.

Such a file is a zip archive: `data.pkl`, a program for a stack machine that builds objects, and one stored member per
tensor storage. The program is disassembled (`pickletools.genops`, which executes nothing) and its few operations that
make containers, numbers and strings are followed here. What it calls is compared by name with the five functions and
the storages that tensors need; everything else becomes an inert `Opaque` that only remembers its name.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trilithon_parallel.checkpoint.errors import CheckpointError
from trilithon_parallel.weights.safetensors_io import bytes_of

_STORAGES: Mapping[str, torch.dtype] = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}

_MAX_PROGRAM_BYTES = 256 * 1024 * 1024  # the structure of a state, without its tensors, is far smaller

_BLOCK_BYTES = 8 * 1024 * 1024  # of one read


@dataclass(frozen=True)
class Named:
    """A module and a name that the file refers to; never imported."""

    name: str


@dataclass
class Opaque:
    """An object of a class that plays no part here, with the state that the file gives it."""

    name: str
    state: Any = None


@dataclass(frozen=True)
class Storage:
    """One run of numbers in the archive."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read: a view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class _Mark:
    """Where the machine will cut its stack."""


@dataclass
class _Machine:
    path: Path
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def cut(self) -> list[Any]:
        """Everything above the last mark, which goes too."""
        at = max(i for i, item in enumerate(self.stack) if isinstance(item, _Mark))
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items


class TorchFile:
    """
    An open file of `torch.save`: `document` is what it holds, with `TensorRef` where tensors are.

    Raises (from the constructor):
        CheckpointError: `checkpoint_unsupported` for another format, `checkpoint_corrupt` for a broken file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path.name} is not a zip archive as torch.save writes it since version 1.6.",
                code="checkpoint_unsupported",
                hint="Where you trust the file, load and save it again with a current torch, or copy it again.",
            )
        self._archive = zipfile.ZipFile(path)
        try:
            programs = [name for name in self._archive.namelist() if name.endswith("/data.pkl")]
            if len(programs) != 1 or self._archive.getinfo(programs[0]).file_size > _MAX_PROGRAM_BYTES:
                raise _broken(path, "it must hold one data.pkl")
            self._root = programs[0].removesuffix("data.pkl")
            self.document = _follow(path, self._archive.read(programs[0]))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the file."""
        self._archive.close()

    def read(self, ref: TensorRef) -> torch.Tensor:
        """The tensor that `ref` stands for, contiguous; of its storage only the part between its ends is read."""
        storage, itemsize = ref.storage, ref.storage.dtype.itemsize
        if 0 in ref.shape:
            return torch.empty(ref.shape, dtype=storage.dtype)
        try:
            info = self._archive.getinfo(f"{self._root}data/{storage.key}")
        except KeyError:
            raise _broken(self.path, f"storage {storage.key} is missing") from None
        span = 1 + sum((size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True))
        if info.file_size != storage.numel * itemsize or ref.offset + span > storage.numel:
            raise _broken(self.path, f"storage {storage.key} does not fit its tensor")
        flat = torch.empty(span, dtype=storage.dtype)
        view = bytes_of(flat)
        with self._archive.open(info) as member:
            member.seek(ref.offset * itemsize)
            while view:
                block = member.read(min(len(view), _BLOCK_BYTES))
                if not block:
                    raise _broken(self.path, f"storage {storage.key} is cut short")
                view[: len(block)] = block
                view = view[len(block) :]
        return flat.as_strided(ref.shape, ref.strides).contiguous()


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is broken: {what}.", code="checkpoint_corrupt", hint="Copy the file again.")


def _follow(path: Path, program: bytes) -> Any:
    """Run the harmless part of the program; an operation that has no place in a state is refused by its name."""
    machine = _Machine(path)
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return machine.stack.pop()
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise _broken(path, f"its data.pkl uses {opcode.name}, which states do not need")
            action(machine, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _broken(path, f"its data.pkl does not add up ({type(error).__name__}: {error})") from None
    raise _broken(path, "its data.pkl has no end")


def _push(make: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(make(argument))


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def act(machine: _Machine, argument: Any) -> None:
        items = tuple(machine.stack[-count:])
        del machine.stack[-count:]
        machine.stack.append(items)

    return act


def _set_items(machine: _Machine, argument: Any) -> None:
    items = machine.cut()
    _fill(machine.stack[-1], items)


def _drop_items(machine: _Machine, argument: Any) -> None:
    machine.cut()


def _set_item(machine: _Machine, argument: Any) -> None:
    items = machine.stack[-2:]
    del machine.stack[-2:]
    _fill(machine.stack[-1], items)


def _fill(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if _is_key(key))


def _is_key(key: Any) -> bool:
    return isinstance(key, str | int | float | bool | None)


def _append(machine: _Machine, argument: Any) -> None:
    item = machine.stack.pop()
    _extend(machine.stack[-1], [item])


def _appends(machine: _Machine, argument: Any) -> None:
    items = machine.cut()
    _extend(machine.stack[-1], items)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)


def _persistent(machine: _Machine, argument: Any) -> None:
    kind, dtype, key, _, numel = machine.stack.pop()
    if kind != "storage" or not isinstance(dtype, Named) or dtype.name not in _STORAGES:
        raise _broken(machine.path, f"it refers to {dtype!r:.80}, which is no storage of numbers")
    if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
        raise _broken(machine.path, "it refers to a storage without key or size")
    machine.stack.append(Storage(key, _STORAGES[dtype.name], numel))


def _reduce(machine: _Machine, argument: Any) -> None:
    arguments, called = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(_made(machine.path, called, arguments))


def _made(path: Path, called: Any, arguments: Any) -> Any:
    name = called.name if isinstance(called, Named) else ""
    if name in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"):
        storage, offset, shape, strides = arguments[:4]
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise _broken(path, "a tensor is not described by numbers")
        if len(shape) != len(strides):
            raise _broken(path, "a tensor has not as many strides as dims")
        return TensorRef(storage, offset, tuple(shape), tuple(strides))
    if name in ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"):
        return arguments[0]
    if name == "collections OrderedDict":
        return dict(arguments[0]) if arguments else {}
    return Opaque(name)


def _build(machine: _Machine, argument: Any) -> None:
    state = machine.stack.pop()
    if isinstance(machine.stack[-1], Opaque):
        machine.stack[-1].state = state


def _stack_global(machine: _Machine, argument: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(Named(f"{module} {name}"))


def _memoize(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _new_object(machine: _Machine, argument: Any) -> None:
    _, called = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(Opaque(called.name if isinstance(called, Named) else ""))


_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "SHORT_BINSTRING", "BINSTRING"),
)
_ACTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(_LITERALS, _push(lambda argument: argument)),
    "MARK": _push(lambda argument: _Mark()),
    "NONE": _push(lambda argument: None),
    "NEWTRUE": _push(lambda argument: True),
    "NEWFALSE": _push(lambda argument: False),
    "EMPTY_DICT": _push(lambda argument: {}),
    "EMPTY_LIST": _push(lambda argument: []),
    "EMPTY_TUPLE": _push(lambda argument: ()),
    "EMPTY_SET": _push(lambda argument: Opaque("set")),
    "GLOBAL": _push(lambda argument: Named(argument)),
    "STACK_GLOBAL": _stack_global,
    "TUPLE": lambda machine, argument: machine.stack.append(tuple(machine.cut())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _drop_items,
    "BINPUT": lambda machine, argument: machine.memo.__setitem__(argument, machine.stack[-1]),
    "LONG_BINPUT": lambda machine, argument: machine.memo.__setitem__(argument, machine.stack[-1]),
    "MEMOIZE": _memoize,
    "BINGET": lambda machine, argument: machine.stack.append(machine.memo[argument]),
    "LONG_BINGET": lambda machine, argument: machine.stack.append(machine.memo[argument]),
    "BINPERSID": _persistent,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "BUILD": _build,
}
"""What each operation does to the stack. Containers of inert objects swallow what is put into them."""
