"""Evaluating a backbone on one source: verification of pairs, and identification where identities are known.

Legend: N images, D dimension.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigvision.jobs.faces.agreement import World
from bigvision.jobs.faces.embed import Embedded, Embedder, embed_together
from bigvision.jobs.faces.search import (
    PairHistogram,
    identity_templates,
    nearest,
    open_set_rates,
    rank_rates,
)
from datasets.face_images import FaceSource
from datasets.faces import open_faces
from datasets.verification import (
    Verification,
    VerificationFile,
    check_kinds,
    check_pairs,
    draw_pairs,
    verify,
)
from tiling.publish import complete

FOLDS = 10
FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
RANKS = (1, 5, 10)
FPIRS = (0.1, 0.01)
ALL_PAIRS = 20_000  # images: two hundred million pairs resolve a FAR of 1e-6


@dataclass(frozen=True)
class Identification:
    """Closed-set rank-k rates and open-set rates at shares of false positives."""

    gallery: int
    probes: int
    ranks: dict[int, float]
    open_set: dict[float, float]


@dataclass(frozen=True)
class Evaluated:
    """What is known of a backbone on a source."""

    data: str
    images: int
    damaged: tuple[str, ...]
    verification: Verification
    scores: np.ndarray  # float64, of the verified pairs
    same: np.ndarray  # bool
    all_pairs: dict[float, float]  # TAR at FAR over all pairs; empty for a file of pairs
    identification: Identification | None


def open_evaluation(spec: str, size: int) -> FaceSource:
    """A source of `open_faces`, or `bin:PATH`."""
    kind, _, rest = spec.partition(":")
    return VerificationFile(Path(rest)) if kind == "bin" else open_faces(spec, size=size)


def check_verifiable(source: FaceSource, spec: str) -> None:
    """ValueError where no verification can come of a source, however well its images are read."""
    try:
        if isinstance(source, VerificationFile):
            check_kinds(source.same, FOLDS)
        else:
            labels = source.labels()
            check_pairs(labels[labels >= 0])
    except ValueError as error:
        raise ValueError(f"--evaluate {spec}: {error}") from error


@dataclass(frozen=True)
class Verified:
    """Verification of a source, with what it was computed from."""

    embedded: Embedded
    scores: np.ndarray
    same: np.ndarray
    verification: Verification


def verify_source(
    embedder: Embedder, source: FaceSource, name: str, world: World, pairs: int = 6000
) -> Verified:
    """Embed a source with all ranks and verify its pairs, or `pairs` drawn ones of each kind; for every rank.

    Raises ValueError where too little of it can be read, or it has no pairs.
    """
    embedded = embed_together(embedder, source, world)
    if len(embedded.positions) < 2:
        raise ValueError(f"{name}: {len(embedded.positions)} of {len(source)} images can be read")
    if not np.isfinite(embedded.embeddings).all():
        raise ValueError(f"{name}: the embeddings are not finite")
    if isinstance(source, VerificationFile):
        scores, same = file_scores(embedded, source.same)
        return Verified(embedded, scores, same, verify(scores, same, folds=FOLDS, fars=FARS))
    drawn = draw_pairs(embedded.labels, pairs)
    first, second = embedded.embeddings[drawn.first], embedded.embeddings[drawn.second]
    scores = np.einsum("nd,nd->n", first, second, dtype=float)
    found = verify(scores, drawn.same, folds=min(FOLDS, len(scores)), fars=FARS)
    return Verified(embedded, scores, drawn.same, found)


def evaluate_source(embedder: Embedder, source: FaceSource, name: str, world: World) -> Evaluated:
    """Verify a source and, where its identities are known, count all pairs and identify within it.

    All pairs are those of at most `ALL_PAIRS` images. Raises as `verify_source`.
    """
    done = verify_source(embedder, source, name, world)
    every: dict[float, float] = {}
    identification = None
    if not isinstance(source, VerificationFile):
        some = np.random.default_rng(0).permutation(len(done.embedded.labels))[:ALL_PAIRS]
        counted = PairHistogram()
        counted.add(done.embedded.embeddings[some], done.embedded.labels[some])
        every = {far: counted.true_accept_rate(far) for far in FARS}
        identification = identify_within(done.embedded)
    return Evaluated(
        name,
        len(source),
        done.embedded.damaged,
        done.verification,
        done.scores,
        done.same,
        every,
        identification,
    )


def file_scores(embedded: Embedded, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the pairs (2i, 2i + 1) whose images could both be read, and whether they are one person."""
    rows = np.full(2 * len(same), -1)
    rows[embedded.positions] = np.arange(len(embedded.positions))
    first, second = rows[0::2], rows[1::2]
    whole = (first >= 0) & (second >= 0)
    found = embedded.embeddings
    return np.einsum("nd,nd->n", found[first[whole]], found[second[whole]], dtype=float), same[whole]


def identify_within(embedded: Embedded) -> Identification | None:
    """Identify within a set: half of an identity's images make its template, the others are probes.

    For the open set every other identity is left out of the gallery. None where no identity has two images.
    """
    order = np.argsort(embedded.labels, kind="stable")
    labels, vectors = embedded.labels[order], embedded.embeddings[order]
    _, starts, counts = np.unique(labels, return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(starts, counts)
    enrolled = place < np.repeat(counts // 2, counts)
    if not enrolled.any():
        return None
    templates, identities = identity_templates(vectors[enrolled], labels[enrolled])
    probes, truth = vectors[~enrolled], labels[~enrolled]
    known = np.isin(truth, identities)
    found = nearest(probes[known], templates, min(max(RANKS), len(templates)))
    ranks = rank_rates(found, identities, truth[known], tuple(k for k in RANKS if k <= len(templates)))
    half = identities[::2]
    some = nearest(probes, templates[::2], 1)
    return Identification(len(templates), int(known.sum()), ranks, open_set_rates(some, half, truth, FPIRS))


def draw_roc(results: list[Evaluated], path: Path) -> None:
    """A picture of the ROC curves, false accept rate logarithmic; written when complete."""
    from matplotlib.figure import Figure

    from datasets.verification import roc

    figure = Figure((6, 5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        far, tar = roc(result.scores, result.same)
        lowest = 1 / max(1, int((~result.same).sum()))
        axes.step(
            far.clip(lowest), tar, where="post", label=f"{result.data} ({result.verification.accuracy:.4f})"
        )
    axes.set(xscale="log", xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.01))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with complete(path) as place:
        figure.savefig(place, dpi=120)
