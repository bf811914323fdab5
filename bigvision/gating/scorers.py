"""Scorers: x [T, D] -> logits [T, E], in float32 also under autocast (float64 stays float64).

Any callable from x to [T, E] is a scorer. Here are the learnable ones and the random one; hashing is in
``hashing``, tables and trees are in ``fixed``.

Legend: T tokens, D dimension, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .counter import counter_key, counter_uniform


def _wide(x: Tensor) -> Tensor:
    """Float32, unless it is wider already: router arithmetic in bf16 merges close experts."""
    return x if x.dtype == torch.float64 else x.float()


def _check_features(x: Tensor, dim: int) -> None:
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(f"the scorer takes x [T, {dim}], got {list(x.shape)}")


def linear_scores(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T (+ b) of x [T, D] and weight [E, D], in float32 also under autocast; logits [T, E]."""
    _check_features(x, weight.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        rows = _wide(x)
        return functional.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))


def cosine_scores(x: Tensor, weight: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Cosines of x [T, D] and weight [E, D] over ``temperature``; [T, E], float32. Zero vectors score 0."""
    _check_features(x, weight.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        unit = functional.normalize(_wide(x), dim=1)
        return unit @ functional.normalize(weight.to(unit.dtype), dim=1).t() / temperature


class LinearScorer(nn.Module):
    """X W^T + b, the router of most mixtures of experts; see :func:`linear_scores`.

    Args:
        dim: D, features of a token.
        num_experts: E.
        bias: whether a learnt b [E] is added.
    """

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits float32 [T, E] of x [T, D]."""
        return linear_scores(x, self.weight, self.bias)


class CosineScorer(nn.Module):
    """Cosine of a token and an expert's centroid over a temperature; see :func:`cosine_scores`.

    Args:
        dim: D.
        num_experts: E.
        temperature: positive; smaller is sharper.
        learn_temperature: train its logarithm.
    """

    def __init__(
        self, dim: int, num_experts: int, temperature: float = 1.0, *, learn_temperature: bool = False
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.log_temperature = nn.Parameter(
            torch.tensor(float(temperature)).log(), requires_grad=learn_temperature
        )
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits float32 [T, E] of x [T, D]."""
        return cosine_scores(x, self.weight, self.log_temperature.exp())


def random_scores(
    seed: int, step: int, token_ids: Tensor, experts: tuple[int, int] | range, *, stream: int = 0
) -> Tensor:
    """Uniform scores in [0, 1), keyed by (seed, step, global token id, global expert id).

    ``threshold(random_scores(...), 1 - r)`` makes each expert active with probability r (to 2**-24), whatever
    the number of ranks that share the experts: a shard passes its own range and agrees with the whole.

    Args:
        seed: any integer.
        step: any integer; another step draws independent scores.
        token_ids: int64 [T]; the device of the result.
        experts: (start, stop) or a contiguous ``range`` of global expert ids.
        stream: sets apart uses that share a seed.

    Returns:
        float32 [T, stop - start]; identical on CPU and CUDA. 10**7 experts take 40 MB and about 0.05 s on one
        core.
    """
    start, stop = (experts.start, experts.stop) if isinstance(experts, range) else experts
    return counter_uniform(counter_key(seed, step, stream), token_ids, start, stop)


class RandomScorer(nn.Module):
    """Counter-based random scores as a scorer; see :func:`random_scores`.

    Args:
        seed: any integer.
        num_experts: E, all of them.
    """

    def __init__(self, seed: int, num_experts: int) -> None:
        super().__init__()
        self.seed, self.num_experts = seed, num_experts

    def forward(
        self,
        x: Tensor,
        *,
        step: int = 0,
        token_ids: Tensor | None = None,
        experts: tuple[int, int] | range | None = None,
    ) -> Tensor:
        """Scores float32 [T, E] for the T rows of x, whose values don't matter.

        Args:
            x: [T, ...]; gives the number of tokens and the device.
            step: another step draws independent scores.
            token_ids: int64 [T], global; 0..T-1 where absent.
            experts: the range of experts wanted; all where absent.
        """
        ids = torch.arange(len(x), device=x.device) if token_ids is None else token_ids
        return random_scores(self.seed, step, ids, experts or (0, self.num_experts))
