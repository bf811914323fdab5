"""Instance routing: each image takes the networks, the depth or the width that it needs.

Legend: B images, C channels, D features, E experts, K classes (or output channels).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigvision.gating import (
    Experts,
    Gate,
    Gated,
    Routing,
    TopK,
    apply_experts,
    importance_loss,
    load_loss,
    threshold,
)
from bigvision.routing.fitting import check_alike, check_features, check_gate, made_of

Exchange = Callable[[Tensor, Routing, Sequence[Any]], Tensor]


def image_statistics(x: Tensor) -> Tensor:
    """Mean and standard deviation of each channel: float [B, 2C] of images [B, C, H, W]."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.cat([wide.mean((2, 3)), wide.std((2, 3), correction=0)], 1)


def _kind(module: nn.Module, x: Tensor) -> Any:
    """What the shapes of results depend on."""
    return x.shape[1:], x.dtype, x.device, module.training, torch.is_autocast_enabled(x.device.type)


class InstanceRouter(nn.Module):
    """Expert networks for whole images: each image goes to the k that its gate selects.

    Args:
        gate: over image features [B, D] and E experts.
        experts: E modules [n, C, H, W] -> [n, ...] that agree in what they return; with an exchange, those of
            this rank.
        exchange: where experts are spread over ranks: :class:`~bigvision.gating.AllToAllExchange` or
            :class:`~bigvision.gating.AllGatherExchange`.
        features: of images, [B, D]; mean and standard deviation of each channel by default.

    Raises:
        ValueError: no experts, or a gate over another number of experts.
    """

    def __init__(
        self,
        gate: Gate,
        experts: Sequence[nn.Module],
        *,
        exchange: Exchange | None = None,
        features: Callable[[Tensor], Tensor] = image_statistics,
    ) -> None:
        super().__init__()
        if exchange is None:
            if not experts:
                raise ValueError("a router needs at least one expert, got none")
            check_gate(gate, range(len(experts)), None, "images")
        self.gate, self.features, self.exchange = gate, features, exchange
        self.experts = Experts(experts)
        self._fit: set[Any] = set()

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...]: the weighted sum of each image's experts."""
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, Gated]:
        """The results, and the decision that the losses need.

        The first time that images of a shape come, gate and experts are held against it and each other, by a
        run on tensors without values. Experts on other ranks are compared by the exchange when they have run.

        Raises:
            ValueError: before anything is computed, a gate for other features, experts that differ in the
                shape or dtype of what they return, or that don't take such images.
        """
        self._check(x)
        gated = self.gate(self.features(x))
        if self.exchange is not None:
            return self.exchange(x, gated.routing, list(self.experts.experts)), gated
        return self.experts(x, gated.routing), gated

    @torch.compiler.disable  # nothing of it belongs into a graph
    def _check(self, x: Tensor) -> None:
        kind = _kind(self, x)
        if self.exchange is not None or kind in self._fit:
            return  # ranks that refuse alone would leave the others waiting
        experts = list(self.experts.experts)
        check_features(self.gate, range(len(experts)), self.features, x)
        check_alike("expert", [made_of(f"expert {i}", one, x) for i, one in enumerate(experts)], x)
        self._fit.add(kind)

    def balance_loss(self, gated: Gated) -> Tensor:
        """Importance loss, plus the load loss where the gate has Gaussian noise and top-k (Shazeer 2017)."""
        loss = importance_loss(gated.probs)
        noise, selection = self.gate.noise, self.gate.selection
        if noise is not None and noise.kind == "gaussian" and isinstance(selection, TopK):
            std = noise.std(gated.probs.shape[1])
            k = max(int(gated.mask.sum(1).max()), 1) if len(gated.mask) else 1
            loss = loss + load_loss(gated.logits, gated.noisy_logits, k, std)
        return loss


class EarlyExit(nn.Module):
    """Dynamic depth: an image leaves at the first head that is sure of it.

    The heads are the gate: their probabilities meet a threshold. In training (:meth:`forward`) every head
    sees every image; in evaluation (:meth:`exits`) a stage runs on the images that are still there.

    Args:
        stages: modules in sequence.
        heads: one a stage, to logits [n, K].
        confidence: probability of the best class from which an image leaves, 0..1.

    Raises:
        ValueError: another number of heads than stages, none, or a confidence outside 0..1.
    """

    def __init__(self, stages: Sequence[nn.Module], heads: Sequence[nn.Module], confidence: float) -> None:
        super().__init__()
        if not stages or len(stages) != len(heads):
            raise ValueError(f"one head a stage is needed, got {len(stages)} stages and {len(heads)} heads")
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence must be in 0..1, got {confidence}")
        self.stages, self.heads, self.confidence = nn.ModuleList(stages), nn.ModuleList(heads), confidence
        self._fit: set[Any] = set()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits [B, K] of every head: what training needs."""
        found = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            found.append(head(x))
        return found

    @torch.no_grad()
    def exits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] of the head that each image left at, and which that was, int64 [B].

        Raises:
            ValueError: heads that differ in K; found on tensors without values, before anything is computed.
        """
        self._check(x)
        here = torch.arange(len(x), device=x.device)
        depth = torch.full((len(x),), len(self.stages) - 1, device=x.device)
        result: Tensor | None = None
        for number, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            x = stage(x)
            logits = head(x)
            result = logits.new_zeros(len(depth), logits.shape[1]) if result is None else result
            sure = threshold(logits.float().softmax(1), self.confidence).any(1)
            leaves = sure if number + 1 < len(self.stages) else torch.ones_like(sure)
            result[here[leaves]] = logits[leaves]
            depth[here[leaves]] = number
            here, x = here[~leaves], x[~leaves]
            if not len(here):
                break
        assert result is not None
        return result, depth

    @torch.compiler.disable
    def _check(self, x: Tensor) -> None:
        kind = _kind(self, x)
        if kind not in self._fit:
            check_alike("head", made_of("the network", self, x) or (), x)
            self._fit.add(kind)


class SlimBlock(nn.Module):
    """A residual block of which the first hidden channels alone may run (slimmable networks, Yu et al. 2019).

    Args:
        channels: C in and out.
        hidden: channels between, at full width.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.into = nn.Conv2d(channels, hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, width: int | None = None) -> Tensor:
        """[n, C, H, W] of the same; `width`: hidden channels that run, all where absent."""
        k = self.into.out_channels if width is None else width
        if not 1 <= k <= self.into.out_channels:
            raise ValueError(f"width must be in 1..{self.into.out_channels}, got {k}")
        bias = None if self.into.bias is None else self.into.bias[:k]
        hidden = functional.relu(functional.conv2d(x, self.into.weight[:k], bias, padding=1))
        return x + functional.conv2d(hidden, self.out.weight[:, :k], self.out.bias)


class WidthRouter(nn.Module):
    """Dynamic width: each image runs through as many channels of one block as its gate selects.

    Args:
        gate: over image features [B, 2C] and one expert a width.
        block: shared by all widths.
        widths: hidden channels, each in 1..hidden.

    Raises:
        ValueError: widths outside of the block's, or a gate for another number of them or other channels.
    """

    def __init__(self, gate: Gate, block: SlimBlock, widths: Sequence[int]) -> None:
        super().__init__()
        hidden = block.into.out_channels
        if not widths or not all(1 <= width <= hidden for width in widths):
            raise ValueError(f"widths must be in 1..{hidden}, got {tuple(widths)}")
        check_gate(gate, tuple(widths), 2 * block.into.in_channels, "images")
        self.gate, self.block, self.widths = gate, block, tuple(widths)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] of the same; a ValueError for other channels."""
        channels = self.block.into.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x must be [B, {channels}, H, W], got {list(x.shape)}")
        gated = self.gate(image_statistics(x))
        experts = [partial(self.block, width=width) for width in self.widths]
        return apply_experts(x, gated.routing, experts, out_shape=x.shape[1:])
