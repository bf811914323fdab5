"""Losses written as sums over pixels and a function of the sums.

A whole scene never has all its outputs in memory at once, so a loss is two functions: `sums` looks at some
pixels, `value` at the sums over all of them. The first pass over a scene adds the sums up, the second walks
back with the gradient of `value` by each of them, and both together are exact. To add a loss, subclass
`Loss`:

    class Tversky(Loss):
        def sums(self, y, target):                      # any pixels: [1, K, ...] and [1, ...]
            p, truth = y.sigmoid()[:, 0].double(), target.double()
            return torch.stack([(p * truth).sum(), p.sum(), truth.sum()])

        def value(self, sums):
            overlap, found, true = sums
            return 1 - overlap / (0.3 * found + 0.7 * true)

The same object is a loss for images that fit: `loss(model(x), target)`.

Shapes: y [1, K, ...] logits with K classes, target int64 [1, ...] or float [1, K, ...]; `...` is h rows and
W columns, n pixels that a mask left, or nothing for a network with one answer for the whole image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias, Union

import torch
from torch import Tensor
from torch.nn import functional as F

Sums: TypeAlias = Union[Tensor, "tuple[Sums, ...]"]
"""Float64 tensors, possibly nested in tuples, that add up over the pixels."""


class Loss(ABC):
    """A function of sums over pixels. Losses can be added and scaled: `CrossEntropy() + 0.5 * Dice()`."""

    @abstractmethod
    def sums(self, y: Tensor, target: Tensor) -> Sums:
        """The sums over these pixels, float64, differentiable by `y`."""

    @abstractmethod
    def value(self, sums: Sums) -> Tensor:
        """The loss, a scalar, once the sums are over all pixels."""

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        """The loss of an image that is whole."""
        return self.value(self.sums(y, target))

    def __add__(self, other: Loss) -> Loss:
        return WeightedSum([(1.0, self), (1.0, other)])

    def __mul__(self, factor: float) -> Loss:
        return WeightedSum([(float(factor), self)])

    __rmul__ = __mul__


class WeightedSum(Loss):
    """The sum of factor x loss over `terms`."""

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        self.terms = tuple(terms)

    def sums(self, y: Tensor, target: Tensor) -> Sums:
        """Every term's sums, in order."""
        return tuple(loss.sums(y, target) for _, loss in self.terms)

    def value(self, sums: Sums) -> Tensor:
        """The weighted sum of the terms' values."""
        parts = [factor * loss.value(own) for (factor, loss), own in zip(self.terms, sums, strict=True)]
        return torch.stack(parts).sum()


class CrossEntropy(Loss):
    """Mean negative log-likelihood over labelled pixels; 0 where no pixel is labelled.

    Args:
        weight: K class weights; the mean is then weighted, as in `torch.nn.functional.cross_entropy`.
        ignore_index: the label of pixels that don't count.
    """

    def __init__(self, weight: Tensor | None = None, *, ignore_index: int = -100) -> None:
        self.weight, self.ignore_index = weight, ignore_index

    def sums(self, y: Tensor, target: Tensor) -> Tensor:
        """(sum of weight x entropy, sum of weights), [2]."""
        classes, labelled = class_labels(y, target, self.ignore_index)
        entropy = F.cross_entropy(_wide(y), classes, reduction="none").double()
        scale = _pixel_weights(self.weight, classes, labelled)
        return torch.stack([(entropy * scale).sum(), scale.sum()])

    def value(self, sums: Sums) -> Tensor:
        """The weighted mean."""
        return _mean(sums)


class Focal(Loss):
    """Cross-entropy times (1 - p)^gamma, p the true class's probability (Lin et al., 2017, eq. 4).

    The mean is over labelled pixels, weighted by class where `weight` is given; 0 where none is labelled.
    """

    def __init__(self, gamma: float = 2.0, weight: Tensor | None = None, *, ignore_index: int = -100) -> None:
        self.gamma, self.weight, self.ignore_index = gamma, weight, ignore_index

    def sums(self, y: Tensor, target: Tensor) -> Tensor:
        """(sum of weight x focal entropy, sum of weights), [2]."""
        classes, labelled = class_labels(y, target, self.ignore_index)
        entropy = F.cross_entropy(_wide(y), classes, reduction="none").double()
        missed = -torch.expm1(-entropy)  # 1 - p without cancellation
        scale = _pixel_weights(self.weight, classes, labelled)
        return torch.stack([(missed**self.gamma * entropy * scale).sum(), scale.sum()])

    def value(self, sums: Sums) -> Tensor:
        """The weighted mean."""
        return _mean(sums)


class Dice(Loss):
    """1 - the mean over classes of (2|P.T| + smooth) / (|P| + |T| + smooth), soft (Milletari et al., 2016).

    Args:
        weight: K weights of the mean over classes.
        ignore_index: the label of pixels that don't count.
        smooth: keeps classes that don't occur from dividing by zero.
    """

    def __init__(
        self, weight: Tensor | None = None, *, ignore_index: int = -100, smooth: float = 1.0
    ) -> None:
        self.weight, self.ignore_index, self.smooth = weight, ignore_index, smooth

    def sums(self, y: Tensor, target: Tensor) -> Tensor:
        """By class: overlap, predicted area, true area; [3, K]."""
        classes, labelled = class_labels(y, target, self.ignore_index)
        probability = _wide(y).softmax(1) * labelled.unsqueeze(1)
        truth = torch.zeros_like(probability).scatter_(1, classes.unsqueeze(1), 1.0) * labelled.unsqueeze(1)
        pixels = [0, *range(2, y.ndim)]
        parts = (probability * truth, probability, truth)
        return torch.stack([part.sum(pixels, dtype=torch.float64) for part in parts])

    def value(self, sums: Sums) -> Tensor:
        """1 - the (weighted) mean score."""
        assert isinstance(sums, Tensor)
        overlap, found, true = sums
        score = (2 * overlap + self.smooth) / (found + true + self.smooth)
        if self.weight is None:
            return 1 - score.mean()
        weight = self.weight.to(score)
        return 1 - (score * weight).sum() / weight.sum()


class BinaryCrossEntropy(Loss):
    """Mean binary cross-entropy of logits; a target of NaN doesn't count (float targets [1, K, ...]).

    A target without the axis of classes serves a network with one of them.

    Args:
        pos_weight: K weights of the positive part, as in `binary_cross_entropy_with_logits`.
        ignore_index: the integer label of pixels that don't count.
    """

    def __init__(self, pos_weight: Tensor | None = None, *, ignore_index: int = -100) -> None:
        self.pos_weight, self.ignore_index = pos_weight, ignore_index

    def sums(self, y: Tensor, target: Tensor) -> Tensor:
        """(sum of entropies, count), [2]."""
        wide = _wide(y)
        truth, counts = _values(wide, target, self.ignore_index)
        weight = None
        if self.pos_weight is not None:
            weight = self.pos_weight.to(wide).view(-1, *[1] * (y.ndim - 2))
        entropy = F.binary_cross_entropy_with_logits(wide, truth, pos_weight=weight, reduction="none")
        return torch.stack([(entropy.double() * counts).sum(), counts.sum(dtype=torch.float64)])

    def value(self, sums: Sums) -> Tensor:
        """The mean."""
        return _mean(sums)


class SquaredError(Loss):
    """Mean squared error of a regression; a target of NaN doesn't count."""

    def sums(self, y: Tensor, target: Tensor) -> Tensor:
        """(sum of squares, count), [2]."""
        wide = _wide(y)
        truth, counts = _values(wide, target, None)
        error = (wide - truth).double().square() * counts
        return torch.stack([error.sum(), counts.sum(dtype=torch.float64)])

    def value(self, sums: Sums) -> Tensor:
        """The mean."""
        return _mean(sums)


def class_labels(y: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The classes of all pixels, int64 with 0 for unlabelled ones, and which are labelled, bool.

    Raises:
        ValueError: the target is not one class a pixel, or names a class that the network hasn't.
    """
    if target.is_floating_point() or target.shape != y.shape[:1] + y.shape[2:]:
        raise ValueError(
            f"labels must be integers {tuple(y.shape[:1] + y.shape[2:])}, one class a pixel, "
            f"not {target.dtype} {tuple(target.shape)}"
        )
    classes = target.long()
    labelled = classes != ignore_index
    classes = classes.where(labelled, 0)
    unknown = classes[(classes < 0) | (classes >= y.shape[1])]
    if unknown.numel():
        raise ValueError(
            f"labels {unknown.unique().tolist()[:8]}: the network has classes 0..{y.shape[1] - 1} "
            f"and ignore_index is {ignore_index}"
        )
    return classes, labelled


def _wide(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()


def _pixel_weights(weight: Tensor | None, classes: Tensor, labelled: Tensor) -> Tensor:
    scale = labelled.double()
    return scale if weight is None else scale * weight.to(scale)[classes]


def _values(y: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """The target in y's shape and dtype, 0 where it doesn't count, and where it does, float64."""
    if target.ndim == y.ndim - 1:
        target = target.unsqueeze(1)
    if target.shape != y.shape:
        raise ValueError(f"the target's values must be {tuple(y.shape)}, not {tuple(target.shape)}")
    if target.is_floating_point():
        counts = ~target.isnan()
    else:
        counts = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    return target.to(y.dtype).where(counts, 0), counts.double()


def _mean(sums: Sums) -> Tensor:
    assert isinstance(sums, Tensor)
    total, count = sums
    # Without a single labelled pixel the total is 0 too, and so is the mean.
    return total / count.where(count != 0, 1.0)
