"""Search, identification and all-pairs rates against brute force; evaluation of a network whose answer is
known.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bigvision.jobs.faces.agreement import World
from bigvision.jobs.faces.embed import Embedded, Embedder, embed_together
from bigvision.jobs.faces.evaluation import (
    draw_roc,
    evaluate_source,
    file_scores,
    identify_within,
)
from bigvision.jobs.faces.search import (
    PairHistogram,
    identity_templates,
    nearest,
    open_set_rates,
    rank_rates,
)
from bigvision.jobs.identify_faces import Gallery, nearest_identities
from datasets.face_images import DamagedRecordError
from datasets.identities import SyntheticIdentities


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    # Few distinct values, so that ties are common.
    rows = np.random.default_rng(seed).integers(-1, 2, (count, dim)).astype(np.float32)
    rows[:, 0] += 2
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(
    st.integers(0, 6),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(0, 999),
    st.data(),
)
def test_nearest_is_brute_force(
    probes: int, rows: int, dim: int, tile: int, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, rows))
    queries, gallery = unit(probes, dim, seed), unit(rows, dim, seed + 1)
    found = nearest(queries, gallery, k, tile=tile)
    for query, cosines, places in zip(queries, found.cosines, found.rows, strict=True):
        every = torch.from_numpy(gallery) @ torch.from_numpy(query)
        np.testing.assert_allclose(cosines, np.sort(every.numpy())[::-1][:k], atol=1e-6)
        np.testing.assert_allclose(every.numpy()[places], cosines, atol=1e-6)
        assert len(set(places.tolist())) == k


def test_equal_cosines_come_in_gallery_order() -> None:
    gallery = np.tile(np.eye(2, dtype=np.float32), (4, 1))
    for tile in (1, 2, 3, 8):
        assert nearest(np.eye(2, dtype=np.float32), gallery, 3, tile=tile).rows.tolist() == [
            [0, 2, 4],
            [1, 3, 5],
        ]


def test_galleries_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"probes \(1, 3\) do not fit a gallery \(2, 2\)"):
        nearest(unit(1, 3, 0), unit(2, 2, 0), 1)
    with pytest.raises(ValueError, match="3 neighbours out of a gallery of 2"):
        nearest(unit(1, 2, 0), unit(2, 2, 0), 3)


def test_rank_rates_by_hand() -> None:
    gallery = np.eye(3, dtype=np.float32)
    labels = np.array([7, 8, 9])
    probes = np.array([[1, 0, 0], [0.6, 0.8, 0], [0.8, 0.6, 0]], np.float32)
    found = nearest(probes, gallery, 3)
    assert rank_rates(found, labels, np.array([7, 7, 9]), (1, 2, 3)) == {1: 1 / 3, 2: 2 / 3, 3: 1.0}
    with pytest.raises(ValueError, match="rank 4 of 3"):
        rank_rates(found, labels, np.array([7, 7, 9]), (4,))


def test_open_set_rates_by_hand() -> None:
    gallery, labels = np.eye(2, dtype=np.float32), np.array([0, 1])
    # Known probes at 0.9 (right), 0.8 (right), 0.95 (taken for the other); strangers at 0.85 and 0.5.
    cosines = np.array([0.9, 0.8, 0.95, 0.85, 0.5])
    probes = np.stack([cosines, -np.sqrt(1 - cosines**2)], 1).astype(np.float32)
    found = nearest(probes, gallery, 1)
    truth = np.array([0, 0, 1, 5, 6])
    rates = open_set_rates(found, labels, truth, (0.4, 0.5, 1.0))
    assert np.isnan(rates[0.4])
    assert rates[0.5] == pytest.approx(2 / 3)  # threshold above 0.5: both right ones pass
    assert rates[1.0] == pytest.approx(2 / 3)
    assert np.isnan(open_set_rates(found, labels, np.zeros(5, int), (0.5,))[0.5])


def test_templates_are_unit_means() -> None:
    rows = np.array([[1, 0], [0, 1], [0, 1]], np.float32)
    templates, identities = identity_templates(rows, np.array([4, 4, 2]))
    assert identities.tolist() == [2, 4]
    np.testing.assert_allclose(templates, [[0, 1], [np.sqrt(0.5), np.sqrt(0.5)]], rtol=1e-6)


@given(st.integers(2, 24), st.integers(1, 9), st.integers(0, 99))
def test_all_pairs_are_counted_once(count: int, tile: int, seed: int) -> None:
    rows, labels = unit(count, 3, seed), np.random.default_rng(seed).integers(0, 4, count)
    found = PairHistogram(bins=256)
    found.add(rows, labels, tile=tile)
    first, second = np.triu_indices(count, 1)
    same = labels[first] == labels[second]
    assert (found.genuine.sum(), found.impostor.sum()) == (same.sum(), (~same).sum())
    cosines = (rows[first] * rows[second]).sum(1)
    edges = np.arange(257) / 128 - 1
    for far in (1.0, 0.5, 0.1):
        rate = found.true_accept_rate(far)
        if far * (~same).sum() < 1 - 1e-9 or not same.any():
            assert np.isnan(rate)
            continue
        # A cosine within rounding of an edge may fall on either side.
        allowed = [e for e in edges if (cosines[~same] >= e + 1e-5).sum() <= far * (~same).sum() + 1e-9]
        assert rate <= max((cosines[same] >= e - 1e-5).mean() for e in allowed) + 1e-9


class Mean(nn.Module):
    """An embedding of coarse pixels: right where identities differ in their smooth pattern, as synthetic ones
    do.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return pooled - pooled.mean(1, keepdim=True)


def test_an_evaluation_of_a_network_that_can_tell() -> None:
    source = SyntheticIdentities(12, 6, 32)
    result = evaluate_source(Embedder(Mean(), 32, flip=False), source, "synthetic", World())
    assert result.verification.accuracy > 0.8
    assert result.all_pairs[0.1] > 0.5
    assert result.identification is not None
    assert (result.identification.gallery, result.identification.probes) == (12, 36)
    assert result.identification.ranks[1] > 0.7
    assert result.identification.ranks[10] >= result.identification.ranks[5] >= result.identification.ranks[1]


def test_an_embedding_follows_its_image_not_its_batch() -> None:
    source = SyntheticIdentities(4, 3, 32)
    one, many = (Embedder(Mean(), 32, batch_size=size).source(source) for size in (1, 5))
    np.testing.assert_allclose(one.embeddings, many.embeddings, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(many.embeddings, axis=1), 1, atol=1e-6)


def test_the_network_is_evaluated_in_eval_mode_and_left_as_it_was() -> None:
    seen: list[bool] = []

    class Watching(Mean):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.training)
            return super().forward(x)

    model = Watching().train()
    Embedder(model, 32).source(SyntheticIdentities(2, 1, 32))
    assert not any(seen)
    assert model.training


class Holey(SyntheticIdentities):
    """Every third image is damaged."""

    def read(self, index: int) -> tuple[np.ndarray, int]:
        if index % 3 == 0:
            raise DamagedRecordError(f"image {index}", "test")
        return super().read(index)


def test_damaged_images_are_left_out_of_the_right_places() -> None:
    found = embed_together(Embedder(Mean(), 32, batch_size=4), Holey(3, 4, 32), World())
    assert found.positions.tolist() == [1, 2, 4, 5, 7, 8, 10, 11]
    assert found.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert found.damaged[:2] == ("image 0: test", "image 3: test")


def test_pairs_of_a_file_need_both_images() -> None:
    rows = np.eye(2, dtype=np.float32)[[0, 0, 1, 0]]
    embedded = Embedded(np.array([0, 1, 2, 5]), rows, np.array([0, 0, 1, 2]), ())
    scores, same = file_scores(embedded, np.array([True, False, False]))
    assert (scores.tolist(), same.tolist()) == ([1.0], [True])


def test_identification_needs_second_images() -> None:
    assert identify_within(Embedded(np.arange(3), np.eye(3, dtype=np.float32), np.arange(3), ())) is None


def test_what_cannot_be_evaluated_is_refused() -> None:
    class Broken(SyntheticIdentities):
        def read(self, index: int) -> tuple[np.ndarray, int]:
            raise DamagedRecordError("x", "test")

    with pytest.raises(ValueError, match="broken: 0 of 6 images can be read"):
        evaluate_source(Embedder(Mean(), 32), Broken(2, 3, 32), "broken", World())
    with pytest.raises(ValueError, match="verification needs two identities"):
        evaluate_source(Embedder(Mean(), 32), SyntheticIdentities(1, 3, 32), "one", World())


def test_a_picture_of_the_rates(tmp_path: Path) -> None:
    result = evaluate_source(Embedder(Mean(), 32), SyntheticIdentities(6, 4, 32), "synthetic", World())
    draw_roc([result], tmp_path / "roc.png")
    assert (tmp_path / "roc.png").stat().st_size > 5000


@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
def test_the_nearest_identities_are_exact_however_many_rows_one_has(
    probes: int, rows: int, identities: int, k: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    # Most rows are the first identity's, and near to every probe.
    labels = np.minimum(random.integers(0, 4 * identities, rows), identities - 1)[::-1].copy()
    embeddings, queries = unit(rows, 3, seed), unit(probes, 3, seed + 1)
    gallery = Gallery(embeddings, labels, [str(i) for i in range(identities)], "")
    for query, found in zip(queries, nearest_identities(queries, gallery, k), strict=True):
        best = {i: float((embeddings[labels == i] @ query).max()) for i in set(labels.tolist())}
        expected = sorted(best.values(), reverse=True)[:k]
        np.testing.assert_allclose(list(found.values()), expected, atol=1e-6)
        np.testing.assert_allclose([best[i] for i in found], expected, atol=1e-6)


def test_an_identity_that_fills_the_gallery_hides_no_other() -> None:
    """Twenty times k rows used to be looked at: not enough for who has a hundred images."""
    embeddings = np.repeat(np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32), (300, 1, 1), axis=0)
    gallery = Gallery(embeddings, np.repeat([0, 1, 2], (300, 1, 1)), ["a", "b", "c"], "")
    (found,) = nearest_identities(np.array([[1, 0]], np.float32), gallery, 3)
    assert found == {0: 1.0, 1: pytest.approx(0.6), 2: 0.0}
