"""Reading the plain data of a pickle without running it.

A pickle is a program for a stack machine; `pickle.load` lets it call anything. This reader executes only the
opcodes that build lists, tuples, numbers, strings and bytes, and *interprets* three well-known calls by
itself: bytes as Python 3 writes them for old protocols, and NumPy arrays and scalars. Every other name is
refused before anything happens.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = frozenset({"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"})


class _Mark:
    """The stack's MARK."""


@dataclass(frozen=True)
class _Name:
    module: str
    name: str


@dataclass
class _Array:
    """A NumPy array under construction: `_reconstruct` makes it, BUILD gives it shape, type and bytes."""

    value: np.ndarray | None = None


@dataclass
class _DType:
    code: str


class PlainPickleError(ValueError):
    """The pickle is damaged, or holds something that is not plain data."""


def load_plain(path: str | Path) -> Any:
    """Load a pickle of plain data: None, bool, int, float, str, bytes, list, tuple, dict, NumPy arrays and
    scalars.

    Text strings of Python 2 pickles come back as bytes. Raises `PlainPickleError` naming the file and the
    offending opcode or global.
    """
    path = Path(path)
    machine = _Machine()
    try:
        with path.open("rb") as file:
            for opcode, argument, place in pickletools.genops(file):
                if opcode.name == "STOP":
                    return _finish(machine.pop(), {})
                machine.step(opcode.name, argument, place)
    except PlainPickleError as error:
        raise PlainPickleError(f"{path}: {error}") from error
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        MemoryError,  # a length that the damage made enormous
    ) as error:
        raise PlainPickleError(f"{path} is not a readable pickle: {type(error).__name__}: {error}") from error
    raise PlainPickleError(f"{path} ends before its pickle does")


class _Machine:
    """The stack, the memo, and what each permitted opcode does to them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(top := self.stack.pop(), _Mark):
            items.append(top)
        return items[::-1]

    def step(self, name: str, argument: Any, place: int | None) -> None:
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in LITERALS:
            self.stack.append(argument.encode("latin-1") if name in PYTHON2_TEXT else argument)
        elif name in ACTIONS:
            ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise PlainPickleError(f"opcode {name} at byte {place} does more than hold plain data; refused")

    def reduce(self) -> None:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name):
            raise PlainPickleError(f"a call of {name!r}; refused")
        self.stack.append(_interpret(name, arguments))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, _Array):
            target.value = _array_from_state(state)
        elif isinstance(target, _DType):
            target.code = _with_byte_order(target.code, state[1])
        else:
            raise PlainPickleError(f"BUILD of a {type(target).__name__}; refused")

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise PlainPickleError(f"appending to a {type(self.stack[-1]).__name__}; refused")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise PlainPickleError(f"setting items of a {type(self.stack[-1]).__name__}; refused")
        self.stack[-1].update(_pairs(items))

    def take(self, count: int) -> tuple[Any, ...]:
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items


def _interpret(name: _Name, arguments: Any) -> Any:
    """The value of a permitted call, computed here rather than by the named function."""
    module = name.module.removeprefix("numpy._core").removeprefix("numpy.core")
    if (name.module, name.name) in {("_codecs", "encode")}:
        text, encoding = arguments
        if isinstance(text, str) and encoding in ("latin1", "latin-1"):
            return text.encode("latin-1")
    if (name.module, name.name) in {("__builtin__", "bytes"), ("builtins", "bytes")} and arguments == ():
        return b""
    if (name.module, name.name) == ("numpy", "dtype"):
        code = arguments[0].decode("ascii") if isinstance(arguments[0], bytes) else arguments[0]
        if code.lstrip("<>|=") in DTYPES:
            return _DType(code)
    if (module, name.name) == (".multiarray", "_reconstruct"):
        return _Array()
    if (module, name.name) == (".numeric", "_frombuffer"):
        data, dtype, shape, order = arguments
        return _Array(_array_from_state((None, shape, dtype, order == "F", bytes(data))))
    if (module, name.name) == (".multiarray", "scalar"):
        return np.frombuffer(_as_bytes(arguments[1]), arguments[0].code)[0].item()
    raise PlainPickleError(f"a call of {name.module}.{name.name}; refused")


def _array_from_state(state: Any) -> np.ndarray:
    _, shape, dtype, fortran, data = state
    if not isinstance(dtype, _DType):
        raise PlainPickleError("an array of objects; refused")
    return np.frombuffer(_as_bytes(data), dtype.code).reshape(shape, order="F" if fortran else "C")


def _as_bytes(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise PlainPickleError(f"array data of type {type(data).__name__}; refused")
    return data


def _with_byte_order(code: str, order: Any) -> str:
    text = order.decode("ascii") if isinstance(order, bytes) else order
    return code if text not in ("<", ">") else text + code.lstrip("<>|=")


def _finish(value: Any, seen: dict[int, Any]) -> Any:
    """Replace arrays under construction by themselves, at any depth of lists and tuples."""
    if isinstance(value, _Array):
        if value.value is None:
            raise PlainPickleError("an array without data")
        return value.value
    if isinstance(value, (_Name, _DType, _Mark)):
        raise PlainPickleError(f"{value} is not plain data; refused")
    if isinstance(value, list):
        if id(value) not in seen:
            seen[id(value)] = value
            value[:] = [_finish(item, seen) for item in value]
        return value
    if isinstance(value, tuple):
        return tuple(_finish(item, seen) for item in value)
    if isinstance(value, dict):
        return {key: _finish(item, seen) for key, item in value.items()}
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[0::2], items[1::2], strict=True))


def _global(machine: _Machine, argument: str) -> None:
    machine.stack.append(_Name(*argument.split(" ", 1)))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.stack.append(_Name(str(module), str(name)))


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "MARK": _Mark,
}
PYTHON2_TEXT = frozenset({"STRING", "BINSTRING", "SHORT_BINSTRING"})
LITERALS = PYTHON2_TEXT | {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *(
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
    ),
}
ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "DICT": lambda machine, _: machine.stack.append(_pairs(machine.pop_to_mark())),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.update(list(machine.take(2))),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_to_mark()),
    "PUT": lambda machine, key: machine.memo.__setitem__(int(key), machine.stack[-1]),
    "BINPUT": lambda machine, key: machine.memo.__setitem__(key, machine.stack[-1]),
    "LONG_BINPUT": lambda machine, key: machine.memo.__setitem__(key, machine.stack[-1]),
    "MEMOIZE": lambda machine, _: _memoize(machine),
    "GET": lambda machine, key: machine.stack.append(machine.memo[int(key)]),
    "BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "LONG_BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "GLOBAL": _global,
    "STACK_GLOBAL": lambda machine, _: _stack_global(machine),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}
