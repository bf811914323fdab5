"""Verification: are two faces one person? The pairs, and the protocol's numbers.

Accuracy follows the ten-fold protocol of "Labeled Faces in the Wild" (Huang et al. 2007): in each fold the
threshold is chosen on the other nine. TAR at FAR (ISO/IEC 19795) takes the threshold that at most a share FAR
of the impostor pairs reaches; a rate below 1 / impostors cannot be measured and is NaN rather than a guess.

Legend: N pairs, scores are cosines, float64 [N]; same is bool [N].
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.face_images import DamagedRecordError, decode_image
from datasets.plain_pickle import load_plain


class VerificationFile:
    """A `.bin` verification set: encoded images 2i and 2i + 1 form pair i. As a source, the label is the
    pair's number.

    The file is a pickle of (list of encoded images, list of bool), read as plain data. Raises ValueError when
    it is anything else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = load_plain(self.path)
        if not (isinstance(content, (tuple, list)) and len(content) == 2):
            raise ValueError(f"{path} holds a {type(content).__name__}, not (images, same)")
        images, same = content
        self.same = np.asarray(same).astype(bool)
        self._images = [image.tobytes() if isinstance(image, np.ndarray) else image for image in images]
        if self.same.ndim != 1 or len(self._images) != 2 * len(self.same):
            raise ValueError(
                f"{path} holds {len(self._images)} images for {self.same.size} pairs; expected twice as many"
            )
        if not all(isinstance(image, bytes) for image in self._images):
            raise ValueError(f"{path} holds images that are not encoded bytes")
        self.num_classes = len(self.same)

    def __len__(self) -> int:
        return len(self._images)

    def labels(self) -> np.ndarray:
        """The number int64 of each image's pair."""
        return np.arange(len(self)) // 2

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and the number of its pair; raises `DamagedRecordError`."""
        name = f"{self.path.name} image {index}"
        if not self._images[index]:
            raise DamagedRecordError(name, "empty")
        return decode_image(self._images[index], name), index // 2


@dataclass(frozen=True)
class Pairs:
    """Pairs of positions in a source: first and second int64 [N], same bool [N]."""

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray


def draw_pairs(labels: np.ndarray, count: int, seed: int = 0) -> Pairs:
    """At most `count` genuine and as many impostor pairs, in random order; all genuine pairs where they are
    fewer.

    Raises ValueError when no identity has two images, or there is only one identity.
    """
    labels = np.asarray(labels)
    random = np.random.default_rng(seed)
    check_pairs(labels)
    genuine = _genuine_pairs(labels, count, random)
    impostor = _impostor_pairs(labels, len(genuine), random)
    order = random.permutation(len(genuine) + len(impostor))
    both = np.concatenate([genuine, impostor])[order]
    return Pairs(both[:, 0], both[:, 1], order < len(genuine))


def check_pairs(labels: np.ndarray) -> None:
    """ValueError unless images with these labels form a genuine and an impostor pair."""
    identities, sizes = np.unique(labels, return_counts=True)
    if len(identities) < 2 or sizes.max() < 2:
        raise ValueError(
            f"verification needs two identities and one with two images; got {len(identities)} identities, "
            f"{sizes.max() if sizes.size else 0} images at most"
        )


def check_kinds(same: np.ndarray, folds: int) -> None:
    """ValueError unless there are pairs of both kinds, one a fold at least."""
    if len(same) < folds or same.all() or not same.any():
        raise ValueError(
            f"{len(same)} pairs, {int(same.sum())} of them genuine, cannot be verified in {folds} folds"
        )


def _genuine_pairs(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    pairs: list[np.ndarray] = []
    for group in groups:
        upper = np.triu_indices(len(group), 1)
        pairs.append(np.stack([group[upper[0]], group[upper[1]]], axis=1))
    every = np.concatenate(pairs)
    return every if len(every) <= count else every[np.sort(random.choice(len(every), count, replace=False))]


def _impostor_pairs(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    found = np.empty((0, 2), np.int64)
    while len(found) < count:
        drawn = random.integers(0, len(labels), (2 * count, 2))
        found = np.concatenate([found, drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]]])
    return found[:count]


@dataclass(frozen=True)
class Verification:
    """What a verification run found."""

    accuracy: float  # mean over the folds
    spread: float  # standard deviation over the folds
    threshold: float  # mean of the folds' thresholds (a cosine)
    tar_at_far: dict[float, float]
    pairs: int


def verify(
    scores: np.ndarray,
    same: np.ndarray,
    *,
    folds: int = 10,
    fars: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4),
) -> Verification:
    """Accuracy by folds and TAR at each FAR, from the scores of all pairs.

    Raises ValueError for lengths that differ, scores that are not finite, fewer pairs than folds, or one kind
    of pair.
    """
    scores, same = np.asarray(scores, np.float64), np.asarray(same, bool)
    if scores.shape != same.shape or scores.ndim != 1:
        raise ValueError(f"{scores.shape} scores for {same.shape} pairs")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} of {len(scores)} scores are not finite")
    check_kinds(same, folds)
    accuracies, thresholds = [], []
    for held in np.array_split(np.arange(len(scores)), folds):
        rest = np.ones(len(scores), bool)
        rest[held] = False
        threshold = best_threshold(scores[rest], same[rest])
        thresholds.append(threshold)
        accuracies.append(np.mean((scores[held] >= threshold) == same[held]))
    rates = {far: true_accept_rate(scores[same], scores[~same], far) for far in fars}
    return Verification(
        float(np.mean(accuracies)), float(np.std(accuracies)), float(np.mean(thresholds)), rates, len(scores)
    )


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The threshold of highest accuracy; in the middle of the gap between the two scores around it."""
    order = np.argsort(-scores, kind="stable")
    ranked, genuine = scores[order], same[order]
    # Accepting the first k pairs is right for the genuine among them and the impostors behind them.
    right = np.concatenate([[0], np.cumsum(genuine)]) + np.concatenate([np.cumsum(~genuine[::-1])[::-1], [0]])
    possible = np.concatenate([[True], ranked[1:] != ranked[:-1], [True]])  # equal scores go together
    best = int(np.argmax(np.where(possible, right, -1)))
    above = ranked[best - 1] if best else ranked[0] + 1e-6
    below = ranked[best] if best < len(ranked) else ranked[-1] - 1e-6
    return float((above + below) / 2)


def true_accept_rate(genuine: np.ndarray, impostor: np.ndarray, far: float) -> float:
    """Share of genuine scores above the threshold that at most a share `far` of impostor scores reaches.

    NaN when fewer than 1 / far impostor scores are at hand.
    """
    allowed = int(np.floor(far * len(impostor) * (1 + 1e-12)))
    if allowed < 1:
        return float("nan")
    if allowed >= len(impostor):
        return 1.0
    barrier = np.partition(impostor, len(impostor) - allowed - 1)[len(impostor) - allowed - 1]
    return float(np.mean(genuine > barrier))


def roc(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true accept rates, one point a distinct score, from (0, 0) to (1, 1)."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    ranked, genuine = np.asarray(scores)[order], np.asarray(same, bool)[order]
    ends = np.concatenate([ranked[1:] != ranked[:-1], [True]])
    true, false = np.cumsum(genuine)[ends], np.cumsum(~genuine)[ends]
    return np.concatenate([[0], false / max(false[-1], 1)]), np.concatenate([[0], true / max(true[-1], 1)])
