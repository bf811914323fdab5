"""Normalisations N of G(x) = P(N(XW)): logits [T, E] -> probabilities or affinities [T, E].

Legend: T tokens, E experts.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Normalization = Literal["identity", "softmax", "sigmoid", "sinkhorn"]


def normalize(
    logits: Tensor, kind: Normalization = "softmax", *, allowed: Tensor | None = None, iterations: int = 8
) -> Tensor:
    """Normalise router logits.

    "identity" and "sigmoid" act on each entry, "softmax" on each token, "sinkhorn" (Sinkhorn and Knopp 1967;
    for routing: Clark et al. 2022, S-BASE) alternately gives every expert an equal share of the tokens and
    every token 1 in all. Experts that nobody may use, and tokens that may use none, have no part in that.

    Args:
        logits: [T, E] float.
        kind: one of the above.
        allowed: bool [T, E]; an entry that is not allowed gets 0, and a token without any gets zeros.
        iterations: bound on Sinkhorn's passes; always that many, so the cost is known and ranks stay in step.

    Returns:
        [T, E] in the dtype of ``logits``, differentiable.

    Raises:
        ValueError: unknown kind, shapes that differ, or ``iterations`` below 1.
    """
    if kind not in get_args(Normalization):
        raise ValueError(f"kind must be one of {get_args(Normalization)}, got {kind!r}")
    if allowed is not None and (allowed.dtype != torch.bool or allowed.shape != logits.shape):
        raise ValueError(
            f"allowed must be bool {list(logits.shape)}, got {allowed.dtype} {list(allowed.shape)}"
        )
    if kind == "softmax":
        return _softmax(logits, allowed)
    if kind == "sinkhorn":
        return _sinkhorn(logits, allowed, iterations)
    out = logits.sigmoid() if kind == "sigmoid" else logits
    return out if allowed is None else out.masked_fill(~allowed, 0)


def _softmax(logits: Tensor, allowed: Tensor | None) -> Tensor:
    if allowed is None:
        return logits.softmax(1)
    # The smallest finite number rather than -inf: a row without any allowed expert stays finite, gradient
    # included.
    masked = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    return masked.softmax(1).masked_fill(~allowed, 0)


def _sinkhorn(logits: Tensor, allowed: Tensor | None, iterations: int) -> Tensor:
    """Log-domain Sinkhorn; rows last, so they sum to 1 exactly and columns to equal shares in the limit."""
    if iterations < 1:
        raise ValueError(f"Sinkhorn needs at least 1 iteration, got {iterations}")
    if len(logits) == 0:
        return logits
    lowest = torch.finfo(logits.dtype).min / 4
    closed = torch.zeros_like(logits, dtype=torch.bool) if allowed is None else ~allowed
    log_p = logits.masked_fill(closed, lowest)
    for _ in range(iterations):
        # What all columns are scaled to is taken off again by the rows. A column or row that is closed as a
        # whole would get its share all the same: it is closed again after each pass.
        log_p = (log_p - log_p.logsumexp(0, keepdim=True)).masked_fill(closed, lowest)
        log_p = (log_p - log_p.logsumexp(1, keepdim=True)).masked_fill(closed, lowest)
    return log_p.exp().masked_fill(closed, 0)
