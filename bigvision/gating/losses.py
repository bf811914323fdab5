"""Losses that keep a router balanced, small and cheap; all are scalars, finite also without tokens.

Legend: T tokens, E experts.
"""

import math

import torch
from torch import Tensor


def _squared_variation(per_expert: Tensor) -> Tensor:
    """Squared coefficient of variation of [E]: variance over squared mean, 0 where all are 0."""
    mean = per_expert.mean()
    variance = (per_expert - mean).square().mean()
    return variance / torch.where(mean == 0, torch.ones_like(mean), mean.square())


def importance_loss(probs: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' summed probabilities (Shazeer et al. 2017, eq. 7).

    Args:
        probs: float [T, E].

    Returns:
        Scalar, 0 where all experts are equally important.
    """
    return _squared_variation(probs.sum(0))


def load_loss(
    logits: Tensor, noisy_logits: Tensor, k: int, noise_std: float, *, allowed: Tensor | None = None
) -> Tensor:
    """Squared coefficient of variation of the experts' expected load under fresh Gaussian noise.

    An expert's load is the sum over tokens of the probability that its logit with new noise reaches the
    token's k-th highest noisy logit (Shazeer et al. 2017, appendix A, in the form of Riquelme et al. 2021,
    where all experts of a token meet the same threshold): unlike the count it has a gradient.

    Args:
        logits: float [T, E], without noise.
        noisy_logits: float [T, E], as the selection saw them.
        k: at least 1.
        noise_std: standard deviation of the noise, positive.
        allowed: bool [T, E]; other pairs carry no load.

    Returns:
        Scalar, 0 where all logits are equal.

    Raises:
        ValueError: k below 1, noise that is not positive, or shapes that differ.
    """
    if k < 1 or not noise_std > 0 or logits.shape != noisy_logits.shape:
        raise ValueError(
            f"k must be at least 1, noise_std positive and shapes equal, got {k}, {noise_std}, "
            f"{list(logits.shape)} and {list(noisy_logits.shape)}"
        )
    if allowed is not None:
        noisy_logits = noisy_logits.masked_fill(~allowed, -torch.inf)
    bar = noisy_logits.topk(min(k, logits.shape[1]), dim=1).values[:, -1:]
    reach = torch.special.erfc((bar - logits) / (noise_std * math.sqrt(2))) / 2
    return _squared_variation((reach if allowed is None else reach.masked_fill(~allowed, 0)).sum(0))


def switch_loss(probs: Tensor, mask: Tensor) -> Tensor:
    """E * sum over experts of (share of the selected pairs) * (mean probability) (Fedus et al. 2022, eq. 4).

    Args:
        probs: float [T, E], softmax probabilities.
        mask: bool [T, E], the selected pairs; any number a token.

    Returns:
        Scalar, 1 at uniform routing of normalised probabilities.
    """
    if mask.dtype != torch.bool or mask.shape != probs.shape:
        raise ValueError(f"mask must be bool {list(probs.shape)}, got {mask.dtype} {list(mask.shape)}")
    load = mask.sum(0)
    share = load.to(probs.dtype) / load.sum().clamp(min=1)
    return probs.shape[1] * (share * probs.sum(0) / max(len(probs), 1)).sum()


def z_loss(logits: Tensor, *, allowed: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)**2 (Zoph et al. 2022, ST-MoE, eq. 5): keeps logits small.

    Args:
        logits: float [T, E].
        allowed: bool [T, E]; others are left out, and tokens without any count 0.

    Returns:
        Scalar, log(E)**2 at zero logits.
    """
    if allowed is None:
        squares = logits.logsumexp(1).square()
    else:
        # The smallest finite number keeps gradients finite where a row has nothing allowed.
        lowest = torch.finfo(logits.dtype).min
        total = logits.masked_fill(~allowed, lowest).logsumexp(1)
        squares = total.masked_fill(~allowed.any(1), 0).square()
    return squares.sum() / max(len(logits), 1)


def expected_cost(probs: Tensor, cost: Tensor) -> Tensor:
    """Mean over tokens of sum over experts of probs * cost, in the unit of ``cost``; 0 without tokens.

    Args:
        probs: float [T, E].
        cost: float [E], such as measured seconds; at least 0.

    Raises:
        ValueError: another number of costs, or one that is negative or not finite.
    """
    if cost.shape != probs.shape[1:] or not bool((cost.isfinite() & (cost >= 0)).all()):
        raise ValueError(
            f"cost must be {list(probs.shape[1:])} finite numbers of at least 0, got {cost.tolist()}"
        )
    return (probs @ cost.to(probs)).sum() / max(len(probs), 1)


def budget_loss(probs: Tensor, cost: Tensor, budget: float = 0.0) -> Tensor:
    """Squared excess of the expected cost over a budget, both as shares of the dearest expert's cost.

    Args:
        probs: float [T, E].
        cost: float [E], measured latency of each expert in any unit; at least 0.
        budget: 0 to 1, the mean cost that is free of charge.

    Returns:
        Scalar, 0 within the budget; its gradient moves probability from dear experts to cheap ones.

    Raises:
        ValueError: a budget outside 0..1 or costs that don't fit.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"budget must be in 0..1, got {budget}")
    mean = expected_cost(probs, cost)
    dearest = float(cost.max()) if cost.numel() else 0.0
    return (mean / (dearest or 1.0) - budget).clamp(min=0).square()
