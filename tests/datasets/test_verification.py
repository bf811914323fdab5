"""Verification files, pairs and the protocol, against brute force."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.face_images import DamagedRecordError
from datasets.verification import VerificationFile, best_threshold, draw_pairs, roc, true_accept_rate, verify


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value,) * 3).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("wrap", [list, np.asarray])
def test_a_verification_file(tmp_path: Path, protocol: int, wrap: type) -> None:
    path = tmp_path / "lfw.bin"
    images = [jpeg(value) for value in (0, 50, 100, 150)]
    path.write_bytes(pickle.dumps((images, wrap([True, False])), protocol))
    found = VerificationFile(path)
    assert (len(found), found.same.tolist()) == (4, [True, False])
    assert [found.read(i)[1] for i in range(4)] == [0, 0, 1, 1]
    assert abs(int(found.read(2)[0][0, 0, 0]) - 100) <= 1


def test_images_as_numpy_buffers_and_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(([np.frombuffer(jpeg(9), np.uint8), b""], [True])))
    found = VerificationFile(path)
    assert found.read(0)[0].shape == (16, 16, 3)
    with pytest.raises(DamagedRecordError, match=r"a\.bin image 1: empty"):
        found.read(1)


@pytest.mark.parametrize("content", [[1], ([b""], [True]), ([1, 2], [True]), 3])
def test_other_contents_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=str(path)):
        VerificationFile(path)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.integers(1, 40))
def test_pairs(labels: list[int], count: int) -> None:
    array = np.array(labels)
    sizes = np.bincount(array)
    if sizes.max() < 2 or np.count_nonzero(sizes) < 2:
        with pytest.raises(ValueError, match="verification needs"):
            draw_pairs(array, count)
        return
    pairs = draw_pairs(array, count)
    possible = int((sizes * (sizes - 1) // 2).sum())
    np.testing.assert_array_equal(array[pairs.first] == array[pairs.second], pairs.same)
    assert pairs.same.sum() == (~pairs.same).sum() == min(count, possible)
    assert (pairs.first != pairs.second).all()
    genuine = {
        frozenset(pair) for pair in zip(pairs.first[pairs.same], pairs.second[pairs.same], strict=True)
    }
    assert len(genuine) == pairs.same.sum()


SCORES = st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=1, max_size=40)


@given(SCORES)
def test_the_best_threshold_is_the_best(scored: list[tuple[int, bool]]) -> None:
    scores = np.array([score / 8 for score, _ in scored])
    same = np.array([genuine for _, genuine in scored])
    candidates = np.concatenate([np.unique(scores), [scores.max() + 1]])
    best = max(np.mean((scores >= threshold) == same) for threshold in candidates)
    assert np.mean((scores >= best_threshold(scores, same)) == same) == best


@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=20),
    st.lists(st.integers(-5, 5), min_size=1, max_size=20),
    st.sampled_from([1.0, 0.5, 0.2, 0.1, 0.01]),
)
def test_the_true_accept_rate_is_the_highest_allowed(
    genuine: list[int], impostor: list[int], far: float
) -> None:
    right, wrong = np.array(genuine, float), np.array(impostor, float)
    found = true_accept_rate(right, wrong, far)
    if far * len(wrong) < 1 - 1e-9:
        assert np.isnan(found)
        return
    thresholds = np.concatenate([right, wrong, [-9, 9]])
    allowed = [t for t in np.concatenate([thresholds, thresholds + 0.5]) if np.mean(wrong >= t) <= far + 1e-9]
    assert found == max(np.mean(right >= t) for t in allowed)


def test_separated_scores_are_perfect() -> None:
    scores = np.tile([0.9, 0.1], 50)
    found = verify(scores, scores > 0.5, fars=(0.1, 1e-3))
    assert (found.accuracy, found.spread, found.pairs) == (1.0, 0.0, 100)
    assert found.threshold == pytest.approx(0.5)
    assert found.tar_at_far[0.1] == 1.0
    assert np.isnan(found.tar_at_far[1e-3])


def test_the_threshold_of_a_fold_comes_from_the_others() -> None:
    # Two folds of reversed meaning: each one's threshold is right for itself and wrong for the other.
    scores = np.array([0.9, 0.8, 0.2, 0.1, 0.9, 0.8, 0.2, 0.1])
    same = np.array([1, 1, 0, 0, 0, 0, 1, 1], bool)
    assert verify(scores, same, folds=2, fars=()).accuracy <= 0.5


@pytest.mark.parametrize(
    ("scores", "same", "message"),
    [
        ([0.1] * 20, [True] * 19, r"\(20,\) scores for \(19,\) pairs"),
        ([float("nan")] + [0.1] * 19, [True] * 20, "1 of 20 scores are not finite"),
        ([0.1] * 5, [True, False] * 2 + [True], "5 pairs, 3 of them genuine"),
        ([0.1] * 20, [True] * 20, "20 pairs, 20 of them genuine"),
    ],
)
def test_bad_scores_are_refused(scores: list[float], same: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(np.array(scores), np.array(same))


def test_roc_passes_through_every_rate() -> None:
    far, tar = roc(np.array([3.0, 2, 2, 1]), np.array([True, True, False, False]))
    assert far.tolist() == [0, 0, 0.5, 1]
    assert tar.tolist() == [0, 0.5, 1, 1]
