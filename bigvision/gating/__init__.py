"""The one sparse-gating core: G(x) = P(N(XW)).

Scores X W, a normalisation N, a selection P; then pairs of experts and tokens, and rows to and fro. It knows
neither rasters nor faces. See ``docs/gating.md``.
"""

from .counter import counter_bits, counter_gumbel, counter_key, counter_normal, counter_uniform
from .normalize import normalize
from .routing import Routing, combine, dispatch, route
from .rows import gather_rows, sum_rows
from .scorers import CosineScorer, LinearScorer, RandomScorer, cosine_scores, linear_scores, random_scores
from .select import expert_choice, threshold, top_k

__all__ = [
    "CosineScorer",
    "LinearScorer",
    "RandomScorer",
    "Routing",
    "combine",
    "cosine_scores",
    "counter_bits",
    "counter_gumbel",
    "counter_key",
    "counter_normal",
    "counter_uniform",
    "dispatch",
    "expert_choice",
    "gather_rows",
    "linear_scores",
    "normalize",
    "random_scores",
    "route",
    "sum_rows",
    "threshold",
    "top_k",
]
