"""Counted random numbers: no two streams share any, whatever they are for."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import datasets.crops
import datasets.face_batches
import datasets.identities
from datasets.crops import draw_crop, shift_tones
from datasets.identities import SyntheticIdentities
from datasets.streams import Use, stream

words = st.integers(0, 2**64 - 1)
# Neighbours, and numbers that look alike to a generator that folds or adds its counters.
near = st.one_of(st.integers(0, 3), st.integers(0, 2).map(lambda n: (1 << 32) + n), words)
streams = st.tuples(st.sampled_from(Use), near, near, near, near)


@given(streams, streams)
def test_two_streams_share_no_number(first: tuple[Use, int, int, int, int], second: tuple[Use, ...]) -> None:
    a, b = (stream(*one).bit_generator.random_raw(256) for one in (first, second))  # type: ignore[arg-type]
    assert np.array_equal(a, b) if first == second else not set(a.tolist()) & set(b.tolist())


@given(streams)
def test_left_out_counters_are_zero(one: tuple[Use, int, int, int, int]) -> None:
    use, seed, first, *_ = one
    assert stream(use, seed, first).random() == stream(use, seed, first, 0, 0).random()


@pytest.mark.parametrize("counters", [(-1,), (2**64,), (0, 0, 0, 0)])
def test_counters_that_do_not_fit_are_refused(counters: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="up to four numbers from 0 to"):
        stream(Use.CROP, 0, *counters)


def tones(step: int, places: list[int], bands: int) -> np.ndarray:
    """Gains and offsets of crops, a row a crop [N, 2 * bands]."""
    ones = np.ones((len(places), bands, 1, 2), np.float32)
    ones[..., 1] = 2
    one, two = np.moveaxis(shift_tones(ones, 0.5, seed=3, step=step, places=places)[:, :, 0], -1, 0)
    return np.concatenate([two - one - 1, 2 * one - two], axis=1)


@pytest.mark.parametrize("bands", [1, 4, 9])
def test_tones_of_two_crops_of_a_batch_are_independent(bands: int) -> None:
    found = np.stack(
        [tones(step, list(range(6)), bands) for step in range(400)]
    )  # [steps, places, 2 * bands]
    centred = found - found.mean(0)
    centred /= centred.std(0)
    for a, b in combinations(range(6), 2):
        correlation = centred[:, a].T @ centred[:, b] / len(found)
        assert np.abs(correlation).max() < 5 / np.sqrt(len(found))


def test_places_of_two_crops_of_a_batch_are_independent() -> None:
    crops = [[draw_crop([(2000, 3000)], 8, seed=1, step=s, place=p) for p in range(4)] for s in range(400)]
    found = np.array(
        [[(c.window.row_off, c.window.col_off, c.symmetry) for c in batch] for batch in crops], float
    )
    centred = (found - found.mean(0)) / found.std(0)
    for a, b in combinations(range(4), 2):
        assert np.abs(centred[:, a].T @ centred[:, b]).max() / len(found) < 5 / np.sqrt(len(found))


def test_what_makes_synthetic_faces_shares_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns, lights, codes and images of neighbouring seeds, and the augmentation of their batches."""
    drawn: dict[tuple[int, ...], list[int]] = {}

    def recording(use: Use, seed: int, *counters: int) -> np.random.Generator:
        drawn[(use, seed, *counters)] = stream(use, seed, *counters).bit_generator.random_raw(64).tolist()
        return stream(use, seed, *counters)

    for module in (datasets.identities, datasets.face_batches):
        monkeypatch.setattr(module, "stream", recording)
    for seed in (0, 1):
        source = SyntheticIdentities(3, 2, size=16, seed=seed)
        for step in range(6):
            datasets.face_batches.TrainingBatches(source, 2, seed=seed, size=16)[step]
    # Patterns, lights, three codes, six images; augmentation of two epochs of six positions.
    assert len(drawn) == 2 * (1 + 1 + 3 + 6 + 12)
    assert len({number for numbers in drawn.values() for number in numbers}) == 64 * len(drawn)
