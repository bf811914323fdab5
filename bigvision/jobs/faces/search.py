"""Nearest neighbours by cosine over galleries of any size, and the numbers of identification.

The gallery is walked in tiles: a tile of cosines [Q, K] exists, the whole [Q, G] never does, and a
memory-mapped gallery is read once, in order. Closed-set rank-k and the open-set rates follow ISO/IEC 19795-1.

Legend: Q probes, G gallery rows, K rows of a tile, D dimension, k neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TILE = 65536  # gallery rows at most
CELLS = (
    1 << 26
)  # cosines at most: fewer rows for more probes, so that memory is bounded and one reading enough


@dataclass(frozen=True)
class Neighbours:
    """The k nearest gallery rows of each probe, best first; equal cosines in gallery order."""

    cosines: np.ndarray  # float32 [Q, k]
    rows: np.ndarray  # int64 [Q, k]


def nearest(probes: np.ndarray, gallery: np.ndarray, k: int, *, tile: int = TILE) -> Neighbours:
    """The k nearest rows of gallery [G, D] (unit length; may be memory-mapped) for probes [Q, D] (unit
    length).

    Raises ValueError for widths that differ and for k outside [1, G].
    """
    if probes.ndim != 2 or gallery.ndim != 2 or probes.shape[1] != gallery.shape[1]:
        raise ValueError(f"probes {probes.shape} do not fit a gallery {gallery.shape}")
    if not 1 <= k <= len(gallery):
        raise ValueError(
            f"{k} neighbours out of a gallery of {len(gallery)}: from 1 to {len(gallery)} can be asked for"
        )
    best = torch.full((len(probes), 0), -2.0)
    rows = torch.empty((len(probes), 0), dtype=torch.int64)
    rows_at_once = min(tile, max(1, CELLS // max(1, len(probes))))
    for start, cosines in tiles_of_cosines(probes, gallery, rows_at_once):
        here = torch.arange(start, start + cosines.shape[1]).expand_as(cosines)
        best, rows = _best_of(torch.cat([best, cosines], 1), torch.cat([rows, here], 1), k)
    return Neighbours(best.numpy(), rows.numpy())


def tiles_of_cosines(probes: np.ndarray, gallery: np.ndarray, tile: int) -> Iterator[tuple[int, Tensor]]:
    """Pairs of a first gallery row and the cosines float32 [Q, K] from there on."""
    queries = torch.from_numpy(np.ascontiguousarray(probes, np.float32))
    for start in range(0, len(gallery), tile):
        part = torch.from_numpy(np.array(gallery[start : start + tile], np.float32))
        yield start, queries @ part.T


def _best_of(cosines: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, ties in order: earlier columns are earlier gallery rows."""
    if cosines.shape[1] > k:
        # A stable sort of everything would be slow: cut at the k-th value first, then order the few.
        last = torch.topk(cosines, k, dim=1).values[:, -1:]
        tied = cosines == last
        above = (cosines > last).sum(1, keepdim=True)
        keep = (cosines > last) | (tied & (tied.cumsum(1) <= k - above))
        picked = keep.nonzero()[:, 1].view(len(cosines), k)
        cosines, rows = cosines.gather(1, picked), rows.gather(1, picked)
    order = torch.argsort(cosines, dim=1, descending=True, stable=True)
    return cosines.gather(1, order), rows.gather(1, order)


def identity_templates(embeddings: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean embedding of each identity at unit length: float32 [I, D], and the identities int64 [I]."""
    identities, place = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(identities), embeddings.shape[1]), np.float32)
    np.add.at(sums, place, embeddings)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-12), identities


def rank_rates(
    found: Neighbours, gallery_labels: np.ndarray, labels: np.ndarray, ranks: tuple[int, ...]
) -> dict[int, float]:
    """Closed-set identification: share of probes whose identity is among the first k neighbours, for each k.

    Raises ValueError where k exceeds the neighbours found.
    """
    right = gallery_labels[found.rows] == labels[:, None]
    if max(ranks) > right.shape[1]:
        raise ValueError(f"rank {max(ranks)} of {right.shape[1]} neighbours")
    return {k: float(right[:, :k].any(axis=1).mean()) for k in ranks}


def open_set_rates(
    found: Neighbours, gallery_labels: np.ndarray, labels: np.ndarray, fpirs: tuple[float, ...]
) -> dict[float, float]:
    """Open-set identification: share of known probes found first and above the threshold, for each share of
    unknown probes (identity not in the gallery) that reaches the threshold.

    NaN where the unknown probes are too few to measure a share, or there are none of either kind.
    """
    known = np.isin(labels, gallery_labels)
    best = found.cosines[:, 0]
    right = known & (gallery_labels[found.rows[:, 0]] == labels)
    strangers = np.sort(best[~known])[::-1]
    rates = {}
    for fpir in fpirs:
        allowed = int(np.floor(fpir * len(strangers) * (1 + 1e-12)))
        if allowed < 1 or not known.any():
            rates[fpir] = float("nan")
            continue
        barrier = strangers[allowed] if allowed < len(strangers) else -np.inf
        rates[fpir] = float((right & (best > barrier)).sum() / known.sum())
    return rates


@dataclass
class PairHistogram:
    """All pairs of a set, counted by cosine in fine bins: error rates of billions of pairs in a few
    megabytes.

    A rate read from it is that of a threshold at a bin's edge: exact counts, cosines to 2 / bins.
    """

    bins: int = 1 << 20

    def __post_init__(self) -> None:
        self.genuine = np.zeros(self.bins, np.int64)
        self.impostor = np.zeros(self.bins, np.int64)

    def add(self, embeddings: np.ndarray, labels: np.ndarray, *, tile: int = 4096) -> None:
        """Count every unordered pair of rows of embeddings [N, D]."""
        for first in range(0, len(embeddings), tile):
            rows = slice(first, first + tile)
            for second, cosines in tiles_of_cosines(embeddings[rows], embeddings[first:], tile):
                columns = slice(first + second, first + second + cosines.shape[1])
                same = labels[rows, None] == labels[None, columns]
                place = ((cosines.numpy() + 1) * (self.bins / 2)).astype(np.int64).clip(0, self.bins - 1)
                if second == 0:
                    upper = np.triu_indices(len(same), 1, same.shape[1])
                    same, place = same[upper], place[upper]
                self.genuine += np.bincount(place[same], minlength=self.bins)
                self.impostor += np.bincount(place[~same], minlength=self.bins)

    def true_accept_rate(self, far: float) -> float:
        """Share of genuine pairs at the lowest edge that at most a share `far` of impostors reaches; NaN if
        unmeasurable.
        """
        impostors, genuine = int(self.impostor.sum()), int(self.genuine.sum())
        if far * impostors < 1 - 1e-12 or not genuine:
            return float("nan")
        reached = np.cumsum(self.impostor[::-1])[::-1]
        edge = int(np.searchsorted(-reached, -far * impostors * (1 + 1e-12)))
        return float(self.genuine[edge:].sum() / genuine)
