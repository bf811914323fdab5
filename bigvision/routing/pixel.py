"""Pixel routing: a dear network only on the pixels that a cheap one is unsure of.

Gather, run, scatter; where a mask is too full for that to pay, dense (Kirillov et al. 2020, "PointRend", for
the idea of refining points).

Legend: B images, C channels in, K channels out, H, W rows and columns, N selected pixels, h halo,
    k = 2h + 1 rows and columns of a pixel's neighbourhood.
"""

import torch
from torch import Tensor, nn

from bigvision.routing.boxes import Box
from bigvision.routing.experts import RegionExpert

_WINDOWS_AT_ONCE = 1 << 22  # pixels of neighbourhoods gathered at once


class PixelRefiner(nn.Module):
    """Replaces the pixels of a coarse result that a mask selects; see :class:`PixelRouter` for a gate.

    Args:
        network: [B, C, H, W] -> [B, K, H, W] of stride 1 with an exact halo.
        channels: C.
        dense_above: share of selected pixels from which the network runs over the whole image; by default
            where its FLOPs over neighbourhoods reach those over the image.

    Raises:
        ValueError: a network with a stride or that no halo fits; a share outside 0..1.
    """

    def __init__(self, network: nn.Module, channels: int, *, dense_above: float | None = None) -> None:
        super().__init__()
        if dense_above is not None and not 0 <= dense_above <= 1:
            raise ValueError(f"dense_above must be in 0..1, got {dense_above}")
        self.network = network
        self.known = RegionExpert("network", network, channels)
        if self.known.shape.stride != 1 or self.known.shape.scale != 1:
            raise ValueError(
                f"pixels are refined by a network of stride 1, got {self.known.shape.stride} "
                f"at 1/{self.known.shape.scale} of the resolution"
            )
        self.dense_above = self._break_even() if dense_above is None else dense_above

    def forward(self, x: Tensor, coarse: Tensor, mask: Tensor) -> Tensor:
        """The coarse result with selected pixels refined.

        Args:
            x: [B, C, H, W], what the network sees.
            coarse: [B, K, H, W].
            mask: bool [B, H, W], the pixels to refine.

        Returns:
            [B, K, H, W]; differentiable with respect to x, coarse and the network.

        Raises:
            ValueError: shapes that don't fit.
        """
        self.check(x, coarse)
        if mask.dtype != torch.bool or mask.shape != (len(x), *x.shape[-2:]):
            raise ValueError(
                f"for an image {list(x.shape)} the mask must be bool {[len(x), *x.shape[-2:]]}, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        chosen = int(mask.sum())
        if chosen == 0:
            return coarse
        if chosen > self.dense_above * mask.numel():
            return torch.where(mask[:, None], self.network(x), coarse)
        values, where = self._gathered(x, mask)
        return coarse.permute(0, 2, 3, 1).index_put(where, values.to(coarse.dtype)).permute(0, 3, 1, 2)

    def check(self, x: Tensor, coarse: Tensor) -> None:
        """Refuse an image and a coarse result that don't fit.

        Raises:
            ValueError: other channels or sizes.
        """
        expected = [len(x), self.known.shape.channels, *x.shape[-2:]]
        if x.dim() != 4 or x.shape[1] != self.known.channels or list(coarse.shape) != expected:
            raise ValueError(
                f"x must be [B, {self.known.channels}, H, W] and coarse of its size with "
                f"{self.known.shape.channels} channels, got {list(x.shape)} and {list(coarse.shape)}"
            )

    def _gathered(self, x: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Values [N, K] of the selected pixels and where they are, those of like windows together."""
        program = self.known.program(*x.shape[-2:])
        image, row, col = mask.nonzero(as_tuple=True)
        halo = self.known.shape.halo
        height, width = x.shape[-2:]
        # How far a pixel is from each edge, as far as its halo can tell: all that its window depends on.
        edges = (row, col, height - 1 - row, width - 1 - col)
        kind = torch.stack([edge.clamp(max=halo) for edge in edges], 1)
        kinds, which = kind.unique(dim=0, return_inverse=True)
        values, places = [], []
        for number in range(len(kinds)):
            at = (which == number).nonzero().squeeze(1)
            y0, x0 = int(row[at[0]]), int(col[at[0]])
            job = program.job(Box(y0, x0, y0 + 1, x0 + 1))
            for part in at.split(max(_WINDOWS_AT_ONCE // job.read.area, 1)):
                window = _windows(
                    x, image[part], row[part] + job.read.top - y0, col[part] + job.read.left - x0, job.read
                )
                values.append(program.run(window, job.alike).flatten(1))
                places.append(part)
        order = torch.cat(places)
        return torch.cat(values), (image[order], row[order], col[order])

    def _break_even(self) -> float:
        program = self.known.program(64, 64)
        one = program.flops(Box(32, 32, 33, 33))
        return min(1.0, program.flops(Box(0, 0, 64, 64)) / 64**2 / one) if one else 1.0


def _windows(x: Tensor, image: Tensor, row: Tensor, col: Tensor, size: Box) -> Tensor:
    """[N, C, h, w]: windows of x whose upper left corners are given."""
    rows = row[:, None, None] + torch.arange(size.height, device=x.device)[:, None]
    cols = col[:, None, None] + torch.arange(size.width, device=x.device)
    return x.permute(0, 2, 3, 1)[image[:, None, None], rows, cols].permute(0, 3, 1, 2)


def entropy(logits: Tensor) -> Tensor:
    """Uncertainty [B, H, W] in 0..1: entropy of softmax (of sigmoid for K = 1) over its maximum."""
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    logs = logits.float().log_softmax(1)
    return -(logs.exp() * logs).sum(1) / torch.log(torch.tensor(float(logits.shape[1])))


def margin(logits: Tensor) -> Tensor:
    """Uncertainty [B, H, W] in 0..1: one minus the gap between the two most probable classes."""
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    best = logits.float().softmax(1).topk(2, 1).values
    return 1 - (best[:, 0] - best[:, 1])
