"""Reading the plain data of a pickle without letting it call anything.

A pickle is a program that may call whatever it names. Python's own reader asks `find_class` for every name;
this one hands out a few functions of its own, for bytes as Python 3 writes them for old protocols and for
NumPy's arrays and scalars, and refuses every other name before anything happens.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = frozenset({"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"})


class PlainPickleError(ValueError):
    """The pickle is damaged, or holds something that is not plain data."""


def load_plain(path: str | Path) -> Any:
    """Load a pickle of plain data: None, bool, int, float, str, bytes, list, tuple, dict, NumPy arrays and
    scalars.

    Text strings of Python 2 pickles come back as bytes. Raises `PlainPickleError` naming the file and, where
    it names something that is not plain data, that.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="bytes").load()
    except PlainPickleError as error:
        raise PlainPickleError(f"{path}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # a damaged program fails in any way: a bad opcode, an empty stack, no memory
        raise PlainPickleError(f"{path} is not a readable pickle: {type(error).__name__}: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.", 1)
        if (module, name) not in PERMITTED:
            raise PlainPickleError(f"it names {module}.{name}, which is not plain data; refused")
        return PERMITTED[module, name]

    def persistent_load(self, identifier: Any) -> Any:
        raise PlainPickleError(f"it refers to an object outside of itself ({identifier!r}); refused")


class _DType:
    """The type of an array's numbers: numpy's own would let a pickle describe objects."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        order = _text(state[1])
        self.code = order + self.code.lstrip("<>|=") if order in ("<", ">") else self.code


class _Array(np.ndarray):
    """An array that takes its contents from plain bytes only."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not (isinstance(dtype, _DType) and isinstance(data, bytes)):
            raise PlainPickleError("it holds an array of objects; refused")
        super().__setstate__((1, shape, np.dtype(dtype.code), fortran, data))


class _Calls:
    """What a plain pickle may call; methods, as attributes can't be set on them."""

    def encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise PlainPickleError(f"it encodes text as {encoding}; refused")
        return text.encode("latin-1")

    def empty_bytes(self) -> bytes:
        return b""

    def dtype(self, code: Any, *_: Any) -> _DType:
        if _text(code).lstrip("<>|=") not in DTYPES:
            raise PlainPickleError(f"it holds numbers of type {_text(code)}; refused")
        return _DType(_text(code))

    def array(self, *_: Any) -> np.ndarray:
        return np.ndarray.__new__(_Array, (0,), "u1")

    def array_of_buffer(self, data: Any, dtype: _DType, shape: Any, order: str) -> np.ndarray:
        return np.frombuffer(bytes(data), dtype.code).reshape(shape, order=_order(order))

    def scalar(self, dtype: _DType, data: bytes) -> Any:
        return np.frombuffer(data, dtype.code)[0].item()


def _order(order: str) -> Any:
    return "F" if order == "F" else "C"


def _text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


_CALLS = _Calls()
PERMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _CALLS.encode,
    ("builtins", "bytes"): _CALLS.empty_bytes,
    ("__builtin__", "bytes"): _CALLS.empty_bytes,
    ("numpy", "ndarray"): None,  # an argument of `_reconstruct`, which asks for nothing here
    ("numpy", "dtype"): _CALLS.dtype,
    ("numpy._core.multiarray", "_reconstruct"): _CALLS.array,
    ("numpy._core.multiarray", "scalar"): _CALLS.scalar,
    ("numpy._core.numeric", "_frombuffer"): _CALLS.array_of_buffer,
}
