"""What a network's output is: logits, probabilities or a class map. Told from what it gives on trial images.

Legend: C bands in, K channels out, H and W rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigvision.jobs.process.options import Options
from bigvision.jobs.process.results import ResultKind

# Probabilities and classes stay what they are however large the input is; logits grow with it.
_STRENGTHS = (1.0, 1e3, 1e6)
_SUM = 1e-3  # by which probabilities of all classes may miss 1


@dataclass(frozen=True)
class Nature:
    """kind: "logits", "sigmoid" or "softmax" (probabilities, as from these), or "classes" (a class map).

    channels: K. largest: class in the trials, of a class map.
    """

    kind: str
    channels: int
    largest: int = 0

    def result(self, options: Options) -> ResultKind:
        """What is written of such an output; ValueError where it hasn't what the options ask for."""
        if self.kind == "classes":
            return self._of_classes(options)
        if options.activation == "softmax" and self.channels == 1:
            raise ValueError("--activation softmax of one channel is 1 everywhere: sigmoid is meant")
        activation = options.activation
        if activation == "auto":
            activation = "none" if self.is_probability else "sigmoid" if self.channels == 1 else "softmax"
            if self.is_probability and options.output == "logits":
                raise ValueError(
                    f"--output logits: the network gives probabilities, as from a {self.kind}; "
                    "--output probabilities writes them, --activation says what they are if they are none"
                )
        return ResultKind(options.output, self.channels, options.threshold, activation)

    def _of_classes(self, options: Options) -> ResultKind:
        if options.output != "classes":
            raise ValueError(
                f"--output {options.output}: the network gives a class map, of which there are none"
            )
        if options.activation not in ("auto", "none"):
            raise ValueError(f"--activation {options.activation}: the network gives a class map, no logits")
        most = 255 if self.largest < 255 else 65535
        return ResultKind("classes", 1, options.threshold, "classes", most)

    @property
    def is_probability(self) -> bool:
        """Whether the network has applied its activation itself."""
        return self.kind in ("sigmoid", "softmax")

    def told(self, options: Options) -> str:
        """What the user should know of it; empty where there is nothing to tell, or the options settle it."""
        if options.activation != "auto" or self.kind == "logits":
            return ""
        if self.kind == "classes":
            return "the network gives a class map, which is written as it is"
        other = "sigmoid" if self.channels == 1 else "softmax"
        return (
            f"the network gives probabilities, as from a {self.kind}, and none is applied again "
            f"(--activation none confirms it, --activation {other} takes them for logits)"
        )


LOGITS = Nature("logits", 1)


def nature_of(run: Callable[[Tensor], Tensor], example: Tensor) -> Nature:
    """Of a network's output [1, K, H, W] for images like `example` [1, C, H, W].

    Raises:
        ValueError: no finite value for any pixel; whole numbers in several channels; complex numbers.
    """
    first = run(example)
    channels = first.shape[1]
    if first.is_complex():
        raise ValueError(f"its output is of complex numbers ({first.dtype})")
    if not first.is_floating_point():
        if channels != 1:
            raise ValueError(f"its output is {channels} channels of {first.dtype}: a class map has one")
        return Nature("classes", 1, max(0, int(first.max())))
    if not _finite(first).numel():
        first = run(example.abs())
        if not _finite(first).numel():
            raise ValueError(
                "every pixel of its output is NaN or infinite for an ordinary image: its weights have "
                "diverged, or are another network's"
            )
    if not _candidates(_finite(first)):
        return Nature("logits", channels)
    seen = torch.cat([_finite(first), *(_finite(run(example * strength)) for strength in _STRENGTHS[1:])], 1)
    kinds = _candidates(seen)
    if "classes" in kinds and seen.max() > 1:
        return Nature("classes", 1, int(seen.max()))
    if {"softmax", "sigmoid"} & set(kinds) and seen.max() > seen.min():  # a constant is no evidence
        return Nature("softmax" if "softmax" in kinds else "sigmoid", channels)
    return Nature("logits", channels)


def _finite(output: Tensor) -> Tensor:
    """The pixels [K, n] of [1, K, H, W] whose values are all finite."""
    flat = output[0].flatten(1).double()
    return flat[:, flat.isfinite().all(0)]


def _candidates(values: Tensor) -> list[str]:
    """What values [K, n] may be besides logits."""
    if values.min() < 0:
        return []
    found = []
    if len(values) == 1 and bool((values == values.round()).all()):
        found.append("classes")
    if values.max() <= 1:
        sums_to_one = len(values) > 1 and bool(((values.sum(0) - 1).abs() <= _SUM).all())
        found.append("softmax" if sums_to_one else "sigmoid")
    return found
