"""Small runs of training: labelled scenes in files, options that are quick, and what a run left."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigvision.jobs.train_raster import TrainOptions
from bigvision.jobs.train_raster.scene_steps import SceneSteps
from bigvision.jobs.train_raster.steps import CropSteps
from datasets.scene_files import write_scene
from datasets.scenes import Scene

MODEL = "bigvision.models.small_unet:small_unet?width=4&depth=2"
FAST = TrainOptions(
    MODEL, epochs=2, steps_per_epoch=3, crop=32, batch=2, scale=255, mean=(0.4,), std=(0.2,), lr=0.01
)
WHOLE = replace(FAST, crop=0, steps_per_epoch=None, rows=32)

NETWORKS = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 5, 1))

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        y = self.body(x)
        return self.head(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())

class Branching(Gated):
    def forward(self, x):
        return super().forward(-x if x.flatten()[0] > 1e30 else x)

def gated():
    torch.manual_seed(0)
    return Gated()

def branching():
    torch.manual_seed(1)
    return Branching()
"""


def write_pairs(folder: Path) -> Path:
    """Two scenes to train on, 150 and 160 rows of 131 pixels, and one of 170 held out."""
    lines = ["scene,labels,split"]
    for name, seed, split in (("a", 0, "train"), ("b", 1, "train"), ("c", 2, "val")):
        scene = Scene(150 + 10 * seed, 131, seed=seed)
        write_scene(scene, folder / f"{name}.tif")
        write_scene(scene, folder / f"{name}_classes.tif", labels=True)
        lines.append(f"{name}.tif,{name}_classes.tif,{split}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def write_networks(folder: Path) -> Path:
    """A file of networks that need no others: plain, gated (a global statistic), branching (no graph)."""
    path = folder / "networks.py"
    path.write_text(NETWORKS)
    return path


def whole_image(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pixels [1, 4, H, W] and classes int64 [1, H, W] of a scene of `write_pairs`."""
    height = 150 + 10 * seed
    pixels, truth = Scene(height, 131, seed=seed).read(0, 0, height, 131)
    return (torch.from_numpy(pixels)[None] / 255 - 0.4) / 0.2, torch.from_numpy(truth).long()[None]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The model in a run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def interrupted_at(steps: type[CropSteps] | type[SceneSteps], stop: int, run: Callable[[], object]) -> None:
    """Run, with Ctrl-C before step `stop` of that kind of training."""
    original = steps.__call__

    def stopping(self: Any, model: torch.nn.Module, step: int) -> object:
        if step == stop:
            raise KeyboardInterrupt
        return original(self, model, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            run()


def assert_same_run(one: Path, other: Path) -> None:
    """Curves, weights and checkpoint, byte for byte."""
    for name in ("training.csv", "validation.csv", "weights.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name, tensor in weights_of(one).items():
        assert torch.equal(tensor, weights_of(other)[name]), name


def quiet(text: str) -> None:
    """Say nothing."""
