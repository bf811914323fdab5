"""From logits to what is written: classes, probabilities or logits, and how they describe themselves.

Legend: K logits of a pixel, h and w rows and columns, B bands written.
"""

import colorsys
from dataclasses import dataclass

import torch
from torch import Tensor

Colormap = dict[int, tuple[int, int, int, int]]


@dataclass(frozen=True)
class ResultKind:
    """What one pixel of the result is. `channels`: K of the network; one channel is a binary map."""

    output: str
    channels: int
    threshold: float

    @property
    def bands(self) -> int:
        """B: one class, or one band a channel."""
        return 1 if self.output == "classes" else self.channels

    @property
    def dtype(self) -> str:
        """Of the pixels written."""
        if self.output != "classes":
            return "float32"
        return "uint8" if self.channels <= 255 else "uint16"

    @property
    def nodata(self) -> float:
        """The greatest class value that the type holds, or NaN."""
        return {"uint8": 255.0, "uint16": 65535.0}.get(self.dtype, float("nan"))

    @property
    def band_names(self) -> tuple[str, ...]:
        """What each band holds."""
        if self.output == "classes":
            return ("class",)
        what = "probability" if self.output == "probabilities" else "logit"
        if self.channels == 1:
            return (what,)
        return tuple(f"{what} of class {k}" for k in range(self.channels))

    @property
    def colormap(self) -> Colormap | None:
        """A colour for each class; None where classes aren't what is written."""
        if self.output != "classes" or self.dtype != "uint8":
            return None
        return {k: _color(k) for k in range(max(2, self.channels))}

    def convert(self, logits: Tensor) -> Tensor:
        """[K, h, w] logits of any float type -> [B, h, w] pixels of `dtype`."""
        if self.output == "logits":
            return logits.float()
        if self.output == "probabilities":
            return logits.float().sigmoid() if self.channels == 1 else logits.float().softmax(0)
        return self.classes(logits)[None].to(getattr(torch, self.dtype))

    def classes(self, logits: Tensor) -> Tensor:
        """[K, h, w] logits -> int64 or bool [h, w] classes; of equal logits the first wins."""
        if self.channels == 1:
            return logits[0].float().sigmoid() > self.threshold
        return logits.argmax(0)


def _color(k: int) -> tuple[int, int, int, int]:
    """Hues a golden angle apart: neighbours differ, and no number of classes runs out of them."""
    red, green, blue = colorsys.hsv_to_rgb(k * 0.61803398875 % 1, 0.65, 0.95 if k % 2 == 0 else 0.7)
    return round(red * 255), round(green * 255), round(blue * 255), 255
