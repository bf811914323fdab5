"""The gate: scorer, normalisation, selection, and what may push a selection around.

Selection scores and combine weights part ways at once: noise, bias and stickiness touch only the former.

Legend: T tokens, D features, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .balance import BiasBalancer
from .noise import Noise
from .normalize import Normalization, normalize
from .routing import Priority, Routing, route
from .scorers import RandomScorer
from .selection import Selection, TopK, round_up
from .sticky import StickyScores
from .straight import straight_through


@dataclass(frozen=True)
class Gated:
    """What a gate decided, and what its losses need.

    Attributes:
        logits: float32 [T, E], as the scorer gave them.
        noisy_logits: float32 [T, E], with the noise of training.
        probs: float32 [T, E], N(logits): the weights come from here.
        scores: float32 [T, E], what the selection saw; no gradient.
        mask: bool [T, E].
        routing: the pairs within capacity.
        items: int64 [T], whose scores these are, where the gate is sticky.
    """

    logits: Tensor
    noisy_logits: Tensor
    probs: Tensor
    scores: Tensor
    mask: Tensor
    routing: Routing
    items: Tensor | None = None


class Gate(nn.Module):
    """G(x) = P(N(XW)).

    ``forward`` is a function of x and the state and changes nothing, so computing it again (activation
    checkpointing) is harmless. State moves in two calls of training: :meth:`observe` after each
    (micro-)batch and :meth:`advance` after each optimiser step; in eval mode neither does anything.

    Args:
        scorer: callable from x to logits [T, E]. A :class:`RandomScorer` is keyed by the gate's step.
        selection: P; top-1 by default.
        normalization: N.
        noise: on the logits that select, in training mode only.
        balancer: its bias is added to the scores that select.
        sticky: memory blended into the scores that select, for tokens with ``items``.
        capacity_factor: an expert takes at most ceil(factor * selected pairs / E) pairs; no bound if absent.
        priority: who stays where an expert is full, see :func:`route`.
        renormalize: make weights of a token's pairs sum to 1.
        straight: weigh pairs by 1 in the forward pass, see :func:`straight_through`.

    Raises:
        ValueError: ``renormalize`` with top-1, where weights are always 1 and the router would never learn; a
            capacity factor that is not positive; or ``renormalize`` together with ``straight``.
    """

    def __init__(
        self,
        scorer: Callable[..., Tensor],
        selection: Selection | None = None,
        *,
        normalization: Normalization = "softmax",
        noise: Noise | None = None,
        balancer: BiasBalancer | None = None,
        sticky: StickyScores | None = None,
        capacity_factor: float | None = None,
        priority: Priority = "position",
        renormalize: bool = False,
        straight: bool = False,
    ) -> None:
        super().__init__()
        selection = TopK(1) if selection is None else selection
        if renormalize and isinstance(selection, TopK) and selection.final == 1:
            raise ValueError("renormalize at k = 1 makes every weight 1: the router would get no gradient")
        if renormalize and straight:
            raise ValueError("renormalize and straight both fix the weights: choose one")
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"capacity_factor must be positive, got {capacity_factor}")
        self.scorer, self.selection, self.normalization = scorer, selection, normalization
        self.noise, self.balancer, self.sticky = noise, balancer, sticky
        self.capacity_factor, self.priority = capacity_factor, priority
        self.renormalize, self.straight = renormalize, straight
        self.step = 0

    def get_extra_state(self) -> Tensor:
        """The step, for state_dict."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step."""
        self.step = int(state)

    def forward(
        self,
        x: Tensor,
        *,
        force: Tensor | None = None,
        allowed: Tensor | None = None,
        previous: Tensor | None = None,
        token_ids: Tensor | None = None,
        items: Tensor | None = None,
    ) -> Gated:
        """Decide where each token goes.

        Args:
            x: [T, D], or what the scorer takes.
            force: bool [T, E], pairs selected whatever their score.
            allowed: bool [T, E], pairs that may be selected; others have probability 0.
            previous: bool [T, E], the last mask, for a threshold with hysteresis.
            token_ids: int64 [T], global, for noise that doesn't depend on the ranks; 0..T-1 where absent.
            items: int64 [T], what each token is, for sticky routing.

        Returns:
            A :class:`Gated`.
        """
        logits = self._score(x, token_ids)
        probs = normalize(logits, self.normalization, allowed=allowed)
        noisy, scores = logits, probs.detach()
        if self.noise is not None and self.training:
            noisy = self.noise.perturb(logits, step=self.step, token_ids=token_ids)
            scores = normalize(noisy.detach(), self.normalization, allowed=allowed)
        scores = self._push(scores, items)
        mask = self.selection.select(scores, step=self.step, force=force, allowed=allowed, previous=previous)
        weights = straight_through(mask, probs) if self.straight else probs
        routing = route(
            mask,
            weights,
            renormalize=self.renormalize,
            capacity=self._capacity(mask),
            priority=self.priority,
        )
        return Gated(logits, noisy, probs, scores, mask, routing, items)

    def observe(self, gated: Gated) -> None:
        """Count the load and remember the scores of a batch; once a batch, outside of checkpointing."""
        if not self.training:
            return
        if self.balancer is not None:
            self.balancer.observe(gated.mask)
        if self.sticky is not None and gated.items is not None:
            self.sticky.observe(gated.probs.detach(), gated.items)

    def advance(self, group: dist.ProcessGroup | None = None) -> None:
        """End a step: update the balancer (over the ranks of ``group`` if given), and count the step."""
        if not self.training:
            return
        if self.balancer is not None:
            self.balancer.update(group)
        self.step += 1

    def _score(self, x: Tensor, token_ids: Tensor | None) -> Tensor:
        if isinstance(self.scorer, RandomScorer):
            return self.scorer(x, step=self.step, token_ids=token_ids)
        return self.scorer(x)

    def _push(self, scores: Tensor, items: Tensor | None) -> Tensor:
        """Scores blended with memory, plus the bias."""
        if self.sticky is not None and items is not None:
            scores = self.sticky.blend(scores, items)
        return scores if self.balancer is None else scores + self.balancer.bias

    def _capacity(self, mask: Tensor) -> int | None:
        if self.capacity_factor is None:
            return None
        return round_up(self.capacity_factor * int(mask.sum()) / mask.shape[1])
