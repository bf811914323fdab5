"""Selections P of G(x) = P(N(XW)): scores [T, E] -> mask bool [T, E].

Nothing downstream knows how a mask was chosen. Ties go to the lowest id, so a mask is a function of its
scores. No selection differentiates: gradients reach the router through the weights of the selected pairs.

Legend: T tokens, E experts (or classes).
"""

import torch
from torch import Tensor


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores are float [T, E], got {scores.dtype} {list(scores.shape)}")


def _check_masks(scores: Tensor, **masks: Tensor | None) -> None:
    for name, mask in masks.items():
        if mask is not None and (mask.dtype != torch.bool or mask.shape != scores.shape):
            raise ValueError(f"{name} must be bool {list(scores.shape)}, got {mask.dtype} {list(mask.shape)}")
    force, allowed = masks.get("force"), masks.get("allowed")
    if force is not None and allowed is not None and bool((contradiction := force & ~allowed).any()):
        token, expert = contradiction.nonzero()[0].tolist()
        raise ValueError(
            f"{int(contradiction.sum())} pairs are forced but not allowed, "
            f"the first: token {token}, expert {expert}"
        )


def _check_count(name: str, count: int | Tensor, rows: int) -> None:
    """A number of at least 0, or int64 with one for each row."""
    if isinstance(count, Tensor) and (count.dtype != torch.int64 or count.shape not in ((), (rows,))):
        raise ValueError(f"{name} must be int64 [{rows}], got {count.dtype} {list(count.shape)}")
    least = int(count.min()) if isinstance(count, Tensor) and count.numel() else count
    if not isinstance(least, Tensor) and least < 0:
        raise ValueError(f"{name} must be at least 0, got {least}")


def _best(scores: Tensor, count: int | Tensor, free: Tensor | None) -> Tensor:
    """Mask of the ``count`` highest free scores of each row, ties to the lowest column.

    A selection by the count-th highest value rather than a sort: for ten million columns it is several times
    faster and holds no permutation.
    """
    num_columns = scores.shape[1]
    wanted = torch.as_tensor(count, device=scores.device).clamp(max=num_columns).expand(len(scores))
    most = int(wanted.max()) if wanted.numel() else 0
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ranked = scores if free is None else scores.masked_fill(~free, -torch.inf)
    if bool(ranked.isnan().any()):
        raise ValueError(
            f"{int(ranked.isnan().sum())} of {scores.numel()} scores are NaN, which have no order"
        )
    # On CUDA torch counts kthvalue among what is not deterministic (its index is not, its value is).
    if most == int(wanted.min()) and scores.device.type == "cpu":
        last = ranked.kthvalue(num_columns - most + 1, dim=1, keepdim=True).values
    else:
        last = ranked.topk(most, dim=1).values.gather(1, (wanted - 1).clamp(min=0)[:, None])
    above, level = ranked > last, ranked == last
    if free is not None:
        level &= free  # a free score of -inf ranks before what is not free
    short = wanted[:, None] - above.sum(1, keepdim=True)
    # Rows where every tie gets in need no running count, which is the dear part.
    if bool((level.sum(1, keepdim=True) != short).any()):
        level &= level.cumsum(1, dtype=torch.int32) <= short
    return (above | level) & (wanted > 0)[:, None]


def top_k(
    scores: Tensor, k: int | Tensor, *, force: Tensor | None = None, allowed: Tensor | None = None
) -> Tensor:
    """Select for each token exactly min(allowed, max(k, forced)) experts: the forced, then the highest
    scores.

    Args:
        scores: float [T, E].
        k: how many, at least 0: one number, or int64 [T] with one per token.
        force: bool [T, E], pairs that are selected whatever their score.
        allowed: bool [T, E], pairs that may be selected.

    Returns:
        bool [T, E].

    Raises:
        ValueError: negative k, wrong shapes, NaN scores, or a pair that is forced but not allowed.
    """
    _check_scores(scores)
    _check_masks(scores, force=force, allowed=allowed)
    _check_count("k", k, len(scores))
    scores = scores.detach()
    if force is None and allowed is None:
        return _best(scores, k, None)
    wanted = torch.as_tensor(k, device=scores.device).expand(len(scores))
    free = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed
    if force is None:
        return _best(scores, torch.minimum(wanted, free.sum(1)), free)
    free = free & ~force
    wanted = torch.minimum((wanted - force.sum(1)).clamp(min=0), free.sum(1))
    return _best(scores, wanted, free) | force


def threshold(
    scores: Tensor,
    tau: float | Tensor,
    *,
    tau_off: float | Tensor | None = None,
    previous: Tensor | None = None,
    force: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Select the pairs that score at least ``tau``; those of ``previous`` stay while they score at least
    ``tau_off``.

    Args:
        scores: float [T, E]; NaN is never selected. Of uniform scores, ``tau = 1 - r`` selects each pair with
            probability r.
        tau: number, or tensor that broadcasts against the scores.
        tau_off: the lower threshold of the hysteresis, at most ``tau``; needs ``previous``.
        previous: bool [T, E], the last mask.
        force: bool [T, E], selected whatever the score.
        allowed: bool [T, E], pairs that may be selected.

    Returns:
        bool [T, E].

    Raises:
        ValueError: wrong shapes, one of ``tau_off`` and ``previous`` without the other, ``tau_off`` above
            ``tau``, or a pair that is forced but not allowed.
    """
    _check_scores(scores)
    _check_masks(scores, previous=previous, force=force, allowed=allowed)
    if (tau_off is None) != (previous is None):
        raise ValueError("hysteresis takes both tau_off and previous, got only one of them")
    mask = scores.detach() >= tau
    if tau_off is not None and previous is not None:
        if bool((torch.as_tensor(tau_off) > torch.as_tensor(tau)).any()):
            raise ValueError(f"tau_off must be at most tau, got {tau_off} > {tau}")
        mask |= previous & (scores.detach() >= tau_off)
    if allowed is not None:
        mask &= allowed
    if force is not None:
        mask |= force
    return mask


def expert_choice(scores: Tensor, capacity: int | Tensor, *, allowed: Tensor | None = None) -> Tensor:
    """Let each expert select its ``capacity`` best tokens (Zhou et al. 2022, "Expert Choice Routing").

    Args:
        scores: float [T, E].
        capacity: tokens per expert, at least 0: one number, or int64 [E]; what exceeds the tokens is ignored.
        allowed: bool [T, E], pairs that may be selected.

    Returns:
        bool [T, E]; every column has min(capacity, allowed tokens) pairs, a token any number from none to E.

    Raises:
        ValueError: negative capacity, wrong shapes or NaN scores.
    """
    _check_scores(scores)
    _check_masks(scores, allowed=allowed)
    _check_count("capacity", capacity, scores.shape[1])
    return top_k(scores.t(), capacity, allowed=None if allowed is None else allowed.t()).t()
