"""`bigvision train --route`: a cheap network, the full one and the gate between them, trained together.

Shapes: N crops, C bands, K classes, s rows and columns of a crop.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigvision.jobs.train_raster.network import build_network
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.jobs.train_raster.parallel import Ranks
from bigvision.jobs.train_raster.routed_validation import RoutedValidation
from bigvision.jobs.train_raster.run_folder import CHEAP_WEIGHTS, GATE_WEIGHTS, ROUTE, RunFolder
from bigvision.jobs.train_raster.steps import CropSteps, Steps
from bigvision.jobs.train_raster.subject import Say
from bigvision.jobs.train_raster.validation import Score
from bigvision.models.spec import parse_spec
from bigvision.routing.cascade import Cascade, cascade_loss
from bigvision.routing.latency import seconds
from bigvision.routing.route_file import RouteSpec, read_route, write_route
from bigvision.streaming.losses import Loss
from datasets.crops import read_crops
from datasets.pairs import LabelledScene


class RoutedNetworks:
    """A cascade of two networks: the cheap one of a ROUTE.toml, and the run's own as the full one.

    Raises:
        ValueError: a route that can't be read or has no learned gate, networks of unlike classes, or a region
            that doesn't fit the crops.
    """

    def __init__(self, route: Path, options: TrainOptions, channels: int) -> None:
        self.options = options
        self.spec = trainable_route(route, options)
        full, self.classes = build_network(options, channels)
        cheap, classes = build_network(
            replace(options, model=self.spec.model, weights=self.spec.weights), channels
        )
        if classes != self.classes:
            raise ValueError(
                f"the cheap network {self.spec.model} has {classes} classes, {options.model} {self.classes}"
            )
        self.model = Cascade(cheap, full, channels, self.spec.region, self.spec.budget)
        self._route = route

    @property
    def files(self) -> tuple[str, ...]:
        """The route and its cheap network; its gate is trained from nothing."""
        named = (self._route, self.spec.weights)
        return (*(str(file) for file in named if file is not None), parse_spec(self.spec.model).source)

    def steps(self, scenes: Sequence[LabelledScene], loss: Loss, ranks: Ranks) -> Steps:
        """Random crops; the networks' latency is measured here."""
        steps = RoutedSteps(self.spec.budget, scenes, self.options, loss, ranks)
        steps.prepare(self.model)
        return steps

    def scorer(self, scenes: Sequence[LabelledScene], ranks: Ranks, say: Say) -> Callable[[], Score]:
        """Whole scenes, routed as `bigvision process --route` would route them."""
        validation = RoutedValidation(self.model, self.spec, scenes, self.classes)
        return partial(validation.score, ranks, getattr(torch, self.options.dtype))

    def save(self, folder: RunFolder) -> None:
        """The weights of both networks and the gate, and the route that names them."""
        folder.save_weights(_plain(self.model.full))
        folder.save_weights(_plain(self.model.cheap), CHEAP_WEIGHTS)
        folder.save_weights(self.model.gate.state_dict(), GATE_WEIGHTS)
        cheap, gate = folder.path / CHEAP_WEIGHTS, folder.path / GATE_WEIGHTS
        trained = replace(self.spec, weights=cheap, gate_weights=gate)
        folder.write(ROUTE, partial(write_route, trained, folder=folder.path))

    def words(self, folder: RunFolder) -> list[str]:
        """The trained route."""
        return [f"--route {folder.path / ROUTE}"]


def trainable_route(path: Path, options: TrainOptions) -> RouteSpec:
    """The route that a run trains; ValueError, naming the file, where it has no gate to train or no room."""
    spec = read_route(path)
    if spec.gate != "learned":
        raise ValueError(
            f"{path}: gate is {spec.gate!r}, which has nothing to train; make it 'learned', or train the "
            "networks one by one"
        )
    if not options.crop or options.crop % spec.region:
        raise ValueError(
            f"{path}: crops of whole regions are needed: --crop {options.crop} is no multiple of the region "
            f"of {spec.region} px"
        )
    return spec


class RoutedSteps(CropSteps):
    """Crops through both networks, and as they are for the gate; see :func:`cascade_loss`."""

    def __init__(
        self,
        budget: float,
        scenes: Sequence[LabelledScene],
        options: TrainOptions,
        loss: Loss,
        ranks: Ranks,
    ) -> None:
        super().__init__(scenes, options, loss, ranks)
        self.budget = budget

    def prepare(self, model: nn.Module) -> None:
        """Measure the latency of both networks: the mean over the ranks, the same on all."""
        assert isinstance(model, Cascade)
        cost = model.measure(partial(seconds, repeats=3))
        cost.copy_(self.ranks.sum_(cost / self.ranks.size))

    def value(self, model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
        """The expected loss of crops [2N, C, s, s], the last N as they are, of classes int64 [N, s, s]."""
        assert isinstance(model, Cascade)
        x, plain = image.chunk(2)
        dtype = getattr(torch, self.options.dtype)
        with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
            return cascade_loss(model, self.loss, x, plain, target, self.budget)

    def batch(self, step: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The crops of a step, and once more without random tones."""
        plain, targets = read_crops(self.scenes, self._crops(step), self.options.crop)
        return np.concatenate([self.shifted(plain, step), plain]), targets


def _plain(network: nn.Module) -> dict[str, Tensor]:
    """The state of the network inside, by the names that its factory gives."""
    inner = network.network
    assert isinstance(inner, nn.Module)
    return inner.state_dict()
