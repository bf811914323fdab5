"""Losses by name for crops that fit in memory.

Shapes: logits [N, K, H, W], target int64 [N, H, W] with IGNORE where there is no class.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood over labelled pixels, weighted by class; 0 where there are none."""
    if not bool((target != IGNORE).any()):
        return logits.sum() * 0
    return F.cross_entropy(logits, target, weight, ignore_index=IGNORE)


def dice(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - the mean over classes of 2|P.T| / (|P| + |T|), soft, over all labelled pixels (Milletari, 2016)."""
    labelled = (target != IGNORE)[:, None]
    truth = F.one_hot(target.where(target != IGNORE, 0), logits.shape[1]).movedim(-1, 1) * labelled
    probability = logits.softmax(1) * labelled
    overlap = (probability * truth).sum((0, 2, 3))
    size = probability.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    score = (2 * overlap + 1) / (size + 1)
    return 1 - (score.mean() if weight is None else (score * weight).sum() / weight.sum())


def focal(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy with the factor (1 - p)^2 (Lin et al., 2017), mean over labelled pixels."""
    labelled = target != IGNORE
    entropy = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    pixel = (1 - torch.exp(-entropy)) ** 2 * entropy * labelled
    scale = labelled.to(pixel.dtype)
    if weight is not None:
        scale = scale * weight[target.where(labelled, 0)]
        pixel = pixel * weight[target.where(labelled, 0)]
    return pixel.sum() / scale.sum().clamp_min(torch.finfo(pixel.dtype).tiny)


LOSSES = {"cross_entropy": cross_entropy, "dice": dice, "focal": focal}


def parse_terms(text: str) -> list[tuple[float, str]]:
    """`cross_entropy+0.5*dice` as [(1, "cross_entropy"), (0.5, "dice")]; ValueError for anything else."""
    terms = []
    for part in text.split("+"):
        factor, _, name = part.strip().rpartition("*")
        try:
            value = float(factor) if factor else 1.0
        except ValueError:
            value = float("nan")
        if name.strip() not in LOSSES or not value > 0:
            raise ValueError(
                f"--loss {text!r}: {part.strip()!r} is not [factor *] one of {', '.join(LOSSES)}"
            )
        terms.append((value, name.strip()))
    return terms


def build_loss(text: str, weight: Tensor | None = None) -> Loss:
    """The weighted sum of the losses that `text` names."""
    terms = parse_terms(text)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for factor, name in terms:
            total = total + factor * LOSSES[name](logits, target, weight)
        return total

    return loss
