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
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
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


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), print, np.array([None]), np.array(1j), 1j])
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


def array_with_state(state: bytes) -> bytes:
    """A pickle that makes an empty array and then sets its state."""
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
    return b"\x80\x02" + made + state + b"b."


OBJECTS = b"cnumpy\ndtype\n(U\x02f8I0\nI1\ntR(I3\nU\x01|N(U\x01at}U\x01aU\x02O8sI8\nI1\nI63\ntb"


@pytest.mark.parametrize(
    "program",
    [
        array_with_state(b"(I1\n(I1\ntcnumpy\ndtype\n(U\x02O8I0\nI1\ntRI00\nU\x08" + b"\x01" * 8 + b"t"),
        array_with_state(b"(I1\n(I9\ntcnumpy\ndtype\n(U\x02f8I0\nI1\ntRI00\nU\x08" + b"\x01" * 8 + b"t"),
        b"\x80\x02c_codecs\nencode\n(NU\x0c__defaults__Ntb.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cbuiltins\nbytes\n(I1000000000000\ntR.",
        b"(cos\nsystem\nVtouch x\no.",
        b"(Vtouch x\nios\nsystem\n.",
        b"Pid\n.",
    ],
    ids=["objects", "too-few-bytes", "set-defaults", "codec", "memory", "OBJ", "INST", "persistent"],
)
def test_programs_made_by_hand_are_refused(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(program)
    with pytest.raises(PlainPickleError, match=str(path)):
        load_plain(path)


def test_a_types_state_can_only_turn_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    state = b"(I1\n(I1\nt" + OBJECTS + b"I00\nU\x08" + np.float64(1.5).tobytes() + b"t"
    path.write_bytes(array_with_state(state))
    assert load_plain(path).tolist() == [1.5]
