"""Straight-through: hard in the forward pass, soft in the backward pass.

Bengio, Léonard and Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
"""

from torch import Tensor


def straight_through(mask: Tensor, probs: Tensor) -> Tensor:
    """The 0/1 mask as numbers, exactly, whose gradient goes to ``probs`` as if they had been it.

    As weights (``route(mask, straight_through(mask, probs))``) every selected pair weighs 1,
    also at k = 1, and the router still learns.

    Args:
        mask: bool [T, E].
        probs: float [T, E].

    Returns:
        [T, E] in the dtype of ``probs``.

    Raises:
        ValueError: shapes that differ.
    """
    if mask.shape != probs.shape:
        raise ValueError(f"mask and probs differ: {list(mask.shape)} and {list(probs.shape)}")
    # probs - probs is exactly 0, where mask + probs - probs would round.
    return mask.to(probs.dtype) + (probs - probs.detach())
