"""Noise on the scores that select, never on the weights that combine.

Counter-based, so recomputation and every number of ranks see the same noise.

Legend: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .counter import counter_gumbel, counter_key, counter_normal, counter_uniform

NoiseKind = Literal["gaussian", "gumbel", "jitter"]
_STREAM = 1  # four counters set noise apart from random scores of the same seed, which have three


@dataclass(frozen=True)
class Noise:
    """What is added to the logits before a selection.

    Attributes:
        kind: "gaussian" adds a normal of standard deviation scale / E (Riquelme et al. 2021, V-MoE),
            "gumbel" adds scale times a Gumbel (top-k then samples without replacement from softmax(logits /
            scale)), "jitter" multiplies by a uniform of [1 - scale, 1 + scale] (Fedus et al. 2022, Switch).
        scale: at least 0.
        seed: any integer.
    """

    kind: NoiseKind = "gaussian"
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(NoiseKind):
            raise ValueError(f"noise must be one of {get_args(NoiseKind)}, got {self.kind!r}")
        if not self.scale >= 0:
            raise ValueError(f"the scale of noise must be at least 0, got {self.scale}")

    def std(self, num_experts: int) -> float:
        """The standard deviation of the Gaussian kind, which the load loss needs."""
        if self.kind != "gaussian":
            raise ValueError(f"only Gaussian noise has a load loss, got {self.kind!r}")
        return self.scale / num_experts

    def perturb(self, logits: Tensor, *, step: int = 0, token_ids: Tensor | None = None) -> Tensor:
        """Noisy logits [T, E]; gradients pass through to ``logits``.

        Args:
            logits: float [T, E].
            step: another step draws independent noise.
            token_ids: int64 [T], global; 0..T-1 where absent.
        """
        num_tokens, num_experts = logits.shape
        ids = torch.arange(num_tokens, device=logits.device) if token_ids is None else token_ids
        key = counter_key(self.seed, step, 0, _STREAM)
        if self.kind == "gaussian":
            drawn = counter_normal(key, ids, 0, num_experts).to(logits.dtype)
            return logits + drawn * self.std(num_experts)
        if self.kind == "gumbel":
            return logits + counter_gumbel(key, ids, 0, num_experts).to(logits.dtype) * self.scale
        drawn = counter_uniform(key, ids, 0, num_experts).to(logits.dtype)
        return logits * (1 + self.scale * (2 * drawn - 1))
