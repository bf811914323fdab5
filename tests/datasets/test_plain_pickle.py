"""Plain data is read as pickle reads it; anything that would call something is refused."""

import datetime
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datasets.plain_pickle import PlainPickleError, load_plain

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner)
)


@given(VALUES, st.sampled_from([0, 1, 2, 3, 4, 5]))
def test_plain_data_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any, protocol: int) -> None:
    path = tmp_path_factory.mktemp("pickle") / "a.bin"
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_plain(path) == value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array", [np.arange(6, dtype="<i4").reshape(2, 3), np.array([True, False]), np.arange(3, dtype=">u2")]
)
def test_numpy_arrays_and_scalars(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps([array, list(array.ravel())], protocol))
    found, scalars = load_plain(path)
    np.testing.assert_array_equal(found, array)
    assert scalars == array.ravel().tolist()


def test_byte_strings_of_python_2_are_bytes(tmp_path: Path) -> None:
    # ('\xff\xd8', [True]) as Python 2 writes it: SHORT_BINSTRING.
    path = tmp_path / "a.bin"
    path.write_bytes(b"\x80\x02U\x02\xff\xd8q\x00]q\x01\x88a\x86q\x02.")
    assert load_plain(path) == (b"\xff\xd8", [True])


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "a.bin", tmp_path / "trace"
    path.write_bytes(pickle.dumps(([Touch(trace)], [True]), protocol))
    with pytest.raises(PlainPickleError, match="refused"):
        load_plain(path)
    assert not trace.exists()


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), {1, 2}, print, np.array([None]), 1j])
def test_other_objects_are_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(PlainPickleError, match=str(path)):
        load_plain(path)


@example(b"\x96" + bytes(7) + b"\x01")  # a byte array that says it has 2**56 bytes
@given(st.binary(max_size=60))
def test_noise_is_refused_or_read_but_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.bin"
    path.write_bytes(noise)
    try:
        load_plain(path)
    except PlainPickleError as error:
        assert str(path) in str(error)


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    whole = pickle.dumps(([b"x" * 1000] * 4, [True, False]), 2)
    path.write_bytes(whole[:-20])
    with pytest.raises(PlainPickleError):
        load_plain(path)
