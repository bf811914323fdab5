"""The oracle of all head tests: an unsharded float64 softmax with autograd and a plain optimiser."""

import os
import subprocess
import sys
from collections.abc import Callable
from math import pi
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What the scenarios of rank_worker.py gave: number of ranks -> rank -> scenario -> result."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("rank_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    logs = [(folder / f"log-{rank}").open("w+") for rank in range(4)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)], env=environment, stderr=log, stdout=log
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [worker.wait(timeout=500) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    texts = [Path(log.name).read_text()[-3000:] for log in logs]
    assert codes == [0] * 4, "\n".join(texts)
    return {
        size: [torch.load(folder / f"out-{size}-{rank}.pt", weights_only=True) for rank in range(size)]
        for size in (1, 2, 3, 4)
    }
