"""The oracle of all head tests: an unsharded float64 softmax with autograd and a plain optimiser."""

from collections.abc import Callable
from math import pi

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Margins = tuple[Tensor | float, Tensor | float, Tensor | float]


def reference_loss(
    x: Tensor,
    labels: Tensor,
    w: Tensor,
    margins: Margins,
    scale: float,
    normalized: bool = True,
    log_weight: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over the labels that aren't -1, every logit in one [B, C] matrix.

    log_weight [C] is added to the logits of all classes but a sample's own.
    """
    keep = labels >= 0
    x, y = x[keep], labels[keep]
    logits = (F.normalize(x) @ F.normalize(w).t() if normalized else x @ w.t()) * 1.0
    rows = torch.arange(len(y))
    t = logits[rows, y]
    m1, m2, m3 = (m[keep] if isinstance(m, Tensor) else m for m in margins)
    if normalized:
        phi = m1 * torch.acos(t) + m2
        k = torch.floor(phi / pi).detach()
        psi = torch.where(k % 2 == 0, 1.0, -1.0) * torch.cos(phi) - 2 * k - m3
    else:
        psi = t
    full = scale * logits
    if log_weight is not None:
        full = full + log_weight
    full = torch.index_put(full, (rows, y), scale * psi)
    return F.cross_entropy(full, y) if len(y) else (x.sum() + w.sum()) * 0


@pytest.fixture(scope="session")
def reference() -> Callable[..., Tensor]:
    return reference_loss


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
