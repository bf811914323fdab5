"""What happens to one tile of classes: pure functions around the GEMMs, written to be compiled.

Logit tiles lie class by class, [K, B]: what belongs to a class (its norm, its log-weight, its gradient's
projection) is then a number a row, and the gradient's GEMM reads its left operand without a transpose.

Legend: K classes of a tile, B samples, D dimension. acc is float64 where the centres are float64, else
float32.
    z          [K, B]  raw products w.u in the GEMMs' dtype; MASKED where the class is the sample's own
    row_scale  [K]     scale / |w|, acc
    offset     [K]     log-weight of the class minus the shift, acc
"""

import torch
from torch import Tensor

from heads.counter import round_stochastically, rounding_noise
from heads.optimizers import RowOptimizer

# The logit of a sample's own class is replaced, not summed. Finite, so that 0 * MASKED is 0 and not NaN.
MASKED = -1e30


def sum_exp(z: Tensor, row_scale: Tensor, offset: Tensor) -> Tensor:
    """Sum over the classes of the tile of exp(z*row_scale + offset): acc [B]."""
    logits = z.to(row_scale.dtype) * row_scale[:, None] + offset[:, None]
    return torch.exp(logits).sum(0)


def max_sum_exp(z: Tensor, row_scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The tile's largest logit [B] and the sum of exponentials relative to it [B]: for logits without a
    bound.
    """
    logits = z.to(row_scale.dtype) * row_scale[:, None] + offset[:, None]
    largest = logits.amax(0)
    return largest, torch.exp(logits - largest).sum(0)


def softmax_gradient_(
    z: Tensor, row_scale: Tensor, log_weight: Tensor, lse: Tensor, coefficient: Tensor
) -> Tensor:
    """Turns z in place into the left operand of the gradient's GEMMs, p*coefficient*row_scale.

    lse and coefficient are acc [B]: the log of the whole denominator, and the sample's weight in the loss.
    Returns q [K] = sum over B of dL/dc * c, which the projection of the normalised centre takes off.
    """
    logits = z.to(row_scale.dtype) * row_scale[:, None]
    p = torch.exp(logits + log_weight[:, None] - lse) * coefficient
    q = (p * logits).sum(1)
    z.copy_((p * row_scale[:, None]).to(z.dtype))
    return q


def inverse_norms(w: Tensor, acc: torch.dtype) -> Tensor:
    """1/|w| of each row, acc [K]; a row of zeros counts as if its length were 1e-6."""
    return 1.0 / torch.sqrt((w.to(acc) ** 2).sum(1)).clamp_min(1e-6)


def update_tile_(
    rule: RowOptimizer,
    columns: dict[str, Tensor],
    narrow: dict[str, Tensor],
    d_w: Tensor,
    projection: Tensor,
    lr: Tensor,
    factor: Tensor,
    keys: tuple[Tensor, ...],
) -> Tensor:
    """One optimiser step of a tile, in place; the gradient is (d_w - projection*w)*factor.

    columns: wide [K, D] ("weight" and moments). narrow: acc or integer [K]. lr, factor: acc scalars. keys:
    two int32 [K], the random keys of stochastic rounding, or none. Returns the new 1/|w| [K], taken after
    rounding.
    """
    acc = projection.dtype
    wide = {name: column.to(acc) for name, column in columns.items()}
    gradient = (d_w.to(acc) - projection[:, None] * wide["weight"]) * factor
    new, new_narrow = rule.step(wide, narrow, gradient, lr)
    kept = {name: rounded(new[name], keys, number) for number, name in enumerate(columns)}
    for name, column in columns.items():
        column.copy_(kept[name])
    for name, column in narrow.items():
        column.copy_(new_narrow[name])
    return inverse_norms(kept["weight"], acc)


def rounded(x: Tensor, keys: tuple[Tensor, ...], number: int) -> Tensor:
    """x acc [K, D] as the centres' dtype can hold it: rounded stochastically to bfloat16 where the rows have
    keys, each column with bits of its own. Still acc: a compiler then needs no copy of what it stores.
    """
    if len(keys) < 2:
        return x
    return round_stochastically(x, rounding_noise((keys[0], keys[1]), number, x.shape[1]))
