"""Pixel routing by a gate: it decides which pixels of a coarse result are refined, and learns it.

Legend: B images, C channels in, K channels out, H, W rows and columns, T = B * H * W pixels, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bigvision.gating import Gate, budget_loss, dense_weights
from bigvision.routing.decision import Decision
from bigvision.routing.fitting import check_gate
from bigvision.routing.pixel import PixelRefiner, entropy, margin

Features = Callable[[Tensor, Tensor], Tensor]


def uncertainty(x: Tensor, coarse: Tensor) -> Tensor:
    """Entropy of the coarse result in 0..1: [B, 1, H, W], without gradient."""
    return entropy(coarse.detach())[:, None]


def pixel_statistics(x: Tensor, coarse: Tensor) -> Tensor:
    """The pixel itself, entropy and margin of the coarse result: [B, C + 2, H, W], without gradient."""
    seen = coarse.detach()
    return torch.cat([x.detach().to(seen.dtype), entropy(seen)[:, None], margin(seen)[:, None]], 1)


class PixelRouter(nn.Module):
    """A :class:`PixelRefiner` whose pixels a gate selects, in place of a mask of the caller's.

    A selected pixel becomes coarse + weight * (refined - coarse), so that a gate learns from the difference
    that refining made. A straight gate refines with weight 1; it learns little, because the loss is flat
    where a refined pixel is right, and is meant for a fixed threshold.

    Args:
        gate: over pixel features [T, D] and one expert, the refinement. Pixels above an uncertainty are
            ``Gate(nn.Identity(), Threshold(tau), normalization="identity", straight=True)``.
        refiner: what computes the selected pixels.
        features: (x, coarse) -> [B, D, H, W] for the gate; :func:`uncertainty` (D = 1) by default,
            :func:`pixel_statistics` has D = C + 2.

    Raises:
        ValueError: a gate for other features or for several experts.
    """

    def __init__(self, gate: Gate, refiner: PixelRefiner, *, features: Features = uncertainty) -> None:
        super().__init__()
        known: dict[Features, int] = {uncertainty: 1, pixel_statistics: refiner.known.channels + 2}
        check_gate(gate, ("refine",), known.get(features), "pixels")
        self.gate, self.refiner, self.features = gate, refiner, features

    def forward(self, x: Tensor, coarse: Tensor, *, allowed: Tensor | None = None) -> Tensor:
        """[B, K, H, W]: the coarse result, refined where the gate says so; see :meth:`decide`."""
        return self.compute(x, coarse, self.decide(x, coarse, allowed=allowed))

    def decide(self, x: Tensor, coarse: Tensor, *, allowed: Tensor | None = None) -> Decision:
        """Select pixels.

        Args:
            x: [B, C, H, W], what the refiner sees.
            coarse: [B, K, H, W].
            allowed: bool [B, H, W], the pixels that may be refined.

        Raises:
            ValueError: other shapes, or a gate for several experts.
        """
        self.refiner.check(x, coarse)
        shape = (len(x), x.shape[-2], x.shape[-1])
        if allowed is not None and (allowed.dtype != torch.bool or tuple(allowed.shape) != shape):
            raise ValueError(f"allowed must be bool {list(shape)}, got {allowed.dtype} {list(allowed.shape)}")
        rows = self.features(x, coarse).permute(0, 2, 3, 1).flatten(0, 2)
        gated = self.gate(rows, allowed=None if allowed is None else allowed.reshape(-1, 1))
        if gated.mask.shape[1] != 1:
            raise ValueError(f"the gate is for {gated.mask.shape[1]} experts, pixels have one, to be refined")
        return Decision(gated, shape)

    def compute(self, x: Tensor, coarse: Tensor, decision: Decision) -> Tensor:
        """[B, K, H, W]: the coarse result with pixels refined as it was decided.

        Raises:
            ValueError: shapes that don't fit, or a decision for another number of pixels.
        """
        refined = self.refiner(x, coarse, decision.chosen(0))
        weight = dense_weights(decision.gated.routing).view(decision.shape)[:, None]
        if self.gate.straight and not (weight.requires_grad and torch.is_grad_enabled()):
            return refined
        return torch.lerp(coarse.to(refined.dtype), refined, weight.to(refined.dtype))

    def budget_loss(self, decision: Decision, budget: float) -> Tensor:
        """Squared excess of the mean probability of refining over a share (0..1) of the pixels."""
        probs = decision.gated.probs
        return budget_loss(probs, probs.new_ones(1), budget)
