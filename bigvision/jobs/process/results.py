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
    """What one pixel of the result is.

    channels: K of the network; one channel is a binary map. activation: what turns the network's output into
    probabilities: "auto" is sigmoid of one channel and softmax of several; "none" where they are
    probabilities already; "classes" where the output is a class map. most: classes that such a map may have.
    """

    output: str
    channels: int
    threshold: float
    activation: str = "auto"
    most: int = 0

    @property
    def bands(self) -> int:
        """B: one class, or one band a channel."""
        return 1 if self.output == "classes" else self.channels

    @property
    def dtype(self) -> str:
        """Of the pixels written."""
        if self.output != "classes":
            return "float32"
        return "uint8" if self._classes <= 255 else "uint16"

    @property
    def _classes(self) -> int:
        """How many there may be."""
        return self.most or self.channels

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
        return {k: _color(k) for k in range(max(2, self._classes))}

    def convert(self, logits: Tensor) -> Tensor:
        """[K, h, w] logits of any float type -> [B, h, w] pixels of `dtype`."""
        if self.output == "logits":
            return logits.float()
        if self.output == "probabilities":
            return self.probabilities(logits)
        return self.classes(logits)[None].to(getattr(torch, self.dtype))

    def probabilities(self, logits: Tensor) -> Tensor:
        """[K, h, w] of the network's output -> float32 [K, h, w]."""
        if self.activation == "none":
            return logits.float()
        if self.activation == "sigmoid" or self.channels == 1:
            return logits.float().sigmoid()
        return logits.float().softmax(0)

    def classes(self, logits: Tensor) -> Tensor:
        """[K, h, w] logits -> int64 or bool [h, w] classes; of equal logits the first wins.

        Raises:
            ValueError: a class of a class map that the result can't hold.
        """
        if self.activation == "classes":
            return self._of_map(logits[0])
        if self.channels == 1:
            return self.probabilities(logits)[0] > self.threshold
        return logits.argmax(0)

    def _of_map(self, classes: Tensor) -> Tensor:
        if classes.is_floating_point():
            classes = classes.nan_to_num(0, 0, 0)
        if classes.dtype != torch.bool:
            least, most = (int(value) for value in classes.aminmax())
            if least < 0 or most >= self.most:
                raise ValueError(
                    f"the network gave class {least if least < 0 else most}: a result of {self.dtype} holds "
                    f"classes 0 to {self.most - 1}"
                )
        return classes.long()

    def logits(self, output: Tensor) -> Tensor:
        """[..., K, h, w] of the network's output as logits, which a gate compares: log(p), of one channel
        log(p / (1 - p))."""
        if self.activation != "none":
            return output
        p = output.float()
        return p.logit(1e-7) if self.channels == 1 else p.clamp_min(1e-30).log()

    def alike(self, one: Tensor, other: Tensor) -> Tensor:
        """Where two outputs [K, h, w] are written alike, bool [h, w]: one class; probabilities within 0.01 of
        each other; logits within a hundredth of the largest."""
        if self.output == "classes":
            return self.classes(one) == self.classes(other)
        first, second = self.convert(one), self.convert(other)
        most = first.abs().max() if self.output == "logits" else 1.0
        return ((first - second).abs() <= 0.01 * most).all(0)

    def spoilt(self, output: Tensor) -> Tensor | None:
        """Where a pixel of [K, h, w] has a NaN or infinite value, bool [h, w]; None where none has."""
        if not output.is_floating_point() or bool(output.sum(dtype=torch.float32).isfinite()):
            return None  # a finite sum has finite parts
        return ~output.isfinite().all(0)


def _color(k: int) -> tuple[int, int, int, int]:
    """Hues a golden angle apart: neighbours differ, and no number of classes runs out of them."""
    red, green, blue = colorsys.hsv_to_rgb(k * 0.61803398875 % 1, 0.65, 0.95 if k % 2 == 0 else 0.7)
    return round(red * 255), round(green * 255), round(blue * 255), 255
