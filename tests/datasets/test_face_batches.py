"""The order of training: a permutation without storage, the same images at a step on any number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datasets.face_batches import TrainingBatches, evaluation_batches, normalized, training_loader
from datasets.face_images import DamagedRecordError
from datasets.identities import SyntheticIdentities
from datasets.shuffling import Permutation


class Numbers:
    """Image i is filled with i and has label i; multiples of `broken` are damaged."""

    def __init__(self, count: int, broken: int = 0) -> None:
        self.num_classes, self.broken = count, broken

    def __len__(self) -> int:
        return self.num_classes

    def read(self, index: int) -> tuple[np.ndarray, int]:
        if self.broken and index % self.broken == 0:
            raise DamagedRecordError(f"record {index}", "test")
        return np.full((8, 8, 3), index, np.uint8), index


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 1000))
def test_the_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = Permutation(count, seed, epoch)
    assert sorted(order(np.arange(count))) == list(range(count))


def test_orders_differ_between_epochs_and_look_random() -> None:
    first, second = (Permutation(10_000, 3, epoch)(np.arange(10_000)) for epoch in (0, 1))
    assert np.mean(first == second) < 0.01
    for order in (first, second):
        assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    with pytest.raises(ValueError, match="not all in"):
        Permutation(4, 0, 0)(np.array([4]))


def test_positions_of_a_huge_order_need_no_storage() -> None:
    places = Permutation(10**12, 0, 0)(np.arange(10))
    assert len(set(places.tolist())) == 10
    assert places.max() < 10**12


@given(st.integers(1, 4), st.integers(0, 9))
def test_ranks_share_the_global_batch(world: int, step: int) -> None:
    source = Numbers(37)
    whole = TrainingBatches(source, 9, seed=1, size=8, augment="light")[step]
    parts = [
        TrainingBatches(source, 9, rank=r, world=world, seed=1, size=8, augment="light")[step]
        for r in range(world)
    ]
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_an_epoch_sees_every_image_at_most_once() -> None:
    batches = TrainingBatches(Numbers(20), 6, size=8)
    assert batches.steps_per_epoch == 3
    labels = torch.cat([batches[step].labels for step in range(3)]).tolist()
    assert len(set(labels)) == len(labels) == 18
    again = torch.cat([batches[step].labels for step in range(3, 6)]).tolist()
    assert again != labels


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_from_any_step(workers: int) -> None:
    batches = TrainingBatches(SyntheticIdentities(5, 6, 16), 4, size=16, augment="light")
    loaded = list(training_loader(batches, 3, 9, workers=workers))
    for step, batch in enumerate(loaded, start=3):
        assert torch.equal(batch.images, batches[step].images)
        assert torch.equal(batch.labels, batches[step].labels)


def test_damaged_records_are_left_out_and_named() -> None:
    batches = TrainingBatches(Numbers(12, broken=3), 12, size=8)
    batch = batches[0]
    assert sorted(batch.labels.tolist()) == [1, 2, 4, 5, 7, 8, 10, 11]
    assert sorted(batch.damaged)[:2] == ["record 0: test", "record 3: test"]


def test_a_part_of_damaged_records_only_is_filled_with_ignored_images() -> None:
    batch = TrainingBatches(Numbers(4, broken=1), 4, size=8)[0]
    assert batch.labels.tolist() == [-1, -1]
    assert (batch.images.shape, len(batch.damaged)) == ((2, 3, 8, 8), 4)


def test_bad_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the 4 images"):
        TrainingBatches(Numbers(4), 5)
    with pytest.raises(ValueError, match="fewer than 2 images for each of 3 ranks"):
        TrainingBatches(Numbers(40), 5, world=3)
    with pytest.raises(ValueError, match="'wild'"):
        TrainingBatches(Numbers(4), 4, augment="wild")


def test_augmentation_leaves_the_middle_where_it_is() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[12:20, 12:20] = 200

    class One(Numbers):
        def read(self, index: int) -> tuple[np.ndarray, int]:
            return image, 0

    batch = TrainingBatches(One(64), 64, size=32, augment="light")[0].images.float()
    assert batch.shape == (64, 3, 32, 32)
    assert batch[:, 0, 15:17, 15:17].mean() > batch[:, 0, :4].mean() + 80
    assert len({tuple(one.flatten().tolist()) for one in batch}) > 60


def test_evaluation_goes_through_in_order() -> None:
    found = list(evaluation_batches(Numbers(7, broken=5), batch_size=3, size=8))
    assert [positions.tolist() for positions, _ in found] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.cat([batch.labels for _, batch in found]).tolist() == [1, 2, 3, 4, 6]
    assert [places[list(batch.kept)].tolist() for places, batch in found] == [[1, 2], [3, 4], [6]]


def test_pixels_are_normalized() -> None:
    assert normalized(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_every_rank_has_images_for_every_part() -> None:
    """A rank with fewer parts than the others would leave them waiting in the statistics of a global norm."""
    batch = TrainingBatches(Numbers(12, broken=2), 12, size=8, fewest=8)[0]
    assert len(batch.damaged) == 6 and batch.labels.tolist().count(-1) == 2
    assert batch.images.shape == (8, 3, 8, 8) and len(batch.kept) == 6
