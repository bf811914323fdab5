"""The one sparse-gating core: G(x) = P(N(XW)).

Scores X W, a normalisation N, a selection P; then pairs of experts and tokens, and rows to and fro. It knows
neither rasters nor faces. See ``docs/gating.md``.
"""

from .balance import BiasBalancer
from .checkpoint import load_experts, save_experts
from .counter import counter_bits, counter_gumbel, counter_key, counter_normal, counter_uniform
from .exchange import AllGatherExchange, AllToAllExchange, expert_range
from .experts import Experts, apply_experts, apply_experts_soft, dense_weights, link_gradients, run_experts
from .fixed import BucketScorer, TableScorer, TreeScorer
from .gate import Gate, Gated
from .hashing import HashScorer, collision_counts, hash_codes, hash_planes, union_collisions
from .losses import budget_loss, expected_cost, importance_loss, load_loss, switch_loss, z_loss
from .mixing import MixedConv2d, MixedLinear, mix_parameters, mixed_conv2d, mixed_linear
from .noise import Noise
from .normalize import normalize
from .routing import Routing, combine, dispatch, route
from .rows import gather_rows, sum_rows
from .schedule import Anneal
from .scorers import CosineScorer, LinearScorer, RandomScorer, cosine_scores, linear_scores, random_scores
from .select import expert_choice, threshold, top_k
from .selection import ExpertChoice, Selection, Threshold, TopK
from .sticky import StickyScores
from .straight import straight_through

__all__ = [
    "AllGatherExchange",
    "AllToAllExchange",
    "Anneal",
    "BiasBalancer",
    "BucketScorer",
    "CosineScorer",
    "ExpertChoice",
    "Experts",
    "Gate",
    "Gated",
    "HashScorer",
    "LinearScorer",
    "MixedConv2d",
    "MixedLinear",
    "Noise",
    "RandomScorer",
    "Routing",
    "Selection",
    "StickyScores",
    "TableScorer",
    "Threshold",
    "TopK",
    "TreeScorer",
    "apply_experts",
    "apply_experts_soft",
    "budget_loss",
    "collision_counts",
    "combine",
    "cosine_scores",
    "counter_bits",
    "counter_gumbel",
    "counter_key",
    "counter_normal",
    "counter_uniform",
    "dense_weights",
    "dispatch",
    "expected_cost",
    "expert_choice",
    "expert_range",
    "gather_rows",
    "hash_codes",
    "hash_planes",
    "importance_loss",
    "linear_scores",
    "link_gradients",
    "load_experts",
    "load_loss",
    "mix_parameters",
    "mixed_conv2d",
    "mixed_linear",
    "normalize",
    "random_scores",
    "route",
    "run_experts",
    "save_experts",
    "straight_through",
    "sum_rows",
    "switch_loss",
    "threshold",
    "top_k",
    "union_collisions",
    "z_loss",
]
