"""The samples of all ranks: ragged batches, looked at before any work.

Shapes: b samples of one rank, B samples of all ranks, D dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bigvision.ranks import Ranks

_OK, _WIDTH, _LABEL, _NOT_FINITE, _PAIRING, _LABEL_TYPE, _DEVICE = range(7)
_KINDS = ("cpu", "cuda", "mps", "xpu", "meta", "another device")  # numbers travel


@dataclass(frozen=True)
class GatheredBatch:
    """The samples of all ranks, in rank order: features [B, D], labels int64 [B], and which of them are this
    rank's.
    """

    features: Tensor
    labels: Tensor
    mine: slice


def gather_batch(
    ranks: Ranks, features: Tensor, labels: Tensor, dim: int, num_classes: int, device: torch.device
) -> GatheredBatch:
    """Gathers ragged batches. Bad input on any rank raises the same ValueError on every rank, before any
    work.

    features: [b, dim] floating; labels: int64 [b] in [-1, num_classes); both on `device`. b may differ
    between ranks and may be 0.
    """
    header = _inspect(features, labels, dim, num_classes, device)
    headers = torch.stack(ranks.gather_rows(header)).tolist()
    for rank, (code, value, position, _) in enumerate(headers):
        if code != _OK:
            raise ValueError(_message(rank, code, value, position, dim, num_classes, device))
    counts = [int(row[3]) for row in headers]
    start = sum(counts[: ranks.rank])
    mine = slice(start, start + counts[ranks.rank])
    if ranks.size == 1:
        return GatheredBatch(features, labels, mine)
    longest = max(counts)
    padded_features = features.new_zeros(longest, dim)
    padded_features[: len(features)] = features
    padded_labels = labels.new_full((longest,), -1)
    padded_labels[: len(labels)] = labels
    parts = zip(ranks.gather_rows(padded_features), ranks.gather_rows(padded_labels), counts, strict=True)
    trimmed = [(f[:n], y[:n]) for f, y, n in parts]
    return GatheredBatch(torch.cat([f for f, _ in trimmed]), torch.cat([y for _, y in trimmed]), mine)


def _inspect(features: Tensor, labels: Tensor, dim: int, num_classes: int, device: torch.device) -> Tensor:
    """(code, offending value, its position, batch size) of this rank's input."""

    def header(code: int, value: int = 0, position: int = 0) -> Tensor:
        return torch.tensor(
            [code, value, position, len(features) if features.ndim else 0], dtype=torch.int64, device=device
        )

    kinds = [tensor.device.type for tensor in (features, labels)]
    if kinds != [device.type] * 2:
        return header(_DEVICE, *(_KINDS.index(k if k in _KINDS else _KINDS[-1]) for k in kinds))

    if features.ndim != 2 or features.shape[1] != dim or not features.is_floating_point():
        return header(_WIDTH, features.shape[-1] if features.ndim else 0, features.ndim)
    if labels.dtype != torch.int64:
        return header(_LABEL_TYPE)
    if labels.shape != (len(features),):
        return header(_PAIRING, labels.numel())
    wrong = (labels < -1) | (labels >= num_classes)
    if wrong.any():
        position = int(wrong.nonzero()[0])
        return header(_LABEL, int(labels[position]), position)
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        return header(_NOT_FINITE, 0, int((~finite).nonzero()[0]))
    return header(_OK)


def _message(
    rank: int, code: int, value: int, position: int, dim: int, num_classes: int, device: torch.device
) -> str:
    kinds = [_KINDS[min(number, len(_KINDS) - 1)] for number in (value, position)]
    return (
        f"rank {rank}: "
        + {
            _WIDTH: f"features must be floating [b, {dim}], got {position} dimension(s), the last of {value}",
            _DEVICE: (
                f"features and labels must be on {device.type}, where the head works, "
                f"got {kinds[0]} and {kinds[1]}"
            ),
            _LABEL_TYPE: "labels must be int64",
            _PAIRING: f"labels must be one a sample, got {value}",
            _LABEL: f"label {value} (sample {position}) is outside [-1, {num_classes})",
            _NOT_FINITE: f"the features of sample {position} are not finite",
        }[code]
    )
