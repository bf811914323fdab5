"""Networks of several outputs: every command takes the same one, or none takes any."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from process_scenes import random_pixels, write_scene
from train_runs import quiet, write_pairs

from bigvision.graph import OutputError, main_output
from bigvision.jobs.plan import plan
from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.train_raster import TrainOptions, train
from bigvision.models.spec import load_model
from bigvision.streaming import StreamedModel
from tiling import open_raster

NETWORKS = """
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

@dataclass
class Output:
    aux: Tensor
    logits: Tensor

class Several(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.make, self.aux, self.main = make, nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
    def forward(self, x):
        return self.make(self.aux(x), self.main(x))

def torchvision_like(): return Several(lambda aux, main: OrderedDict(aux=aux, out=main))
def transformer_like(): return Several(Output)
def features(): return Several(lambda aux, main: [aux, main])
def named(): return Several(lambda aux, main: {"aux": aux, "seg": main})
"""
CLEAR = ("torchvision_like", "transformer_like", "features#1", "features#-1", "named#seg")
UNCLEAR = ("features", "named")


@pytest.fixture
def networks(tmp_path: Path) -> str:
    file = tmp_path / "several.py"
    file.write_text(NETWORKS)
    return str(file)


@pytest.fixture
def scene(tmp_path: Path) -> str:
    return str(write_scene(tmp_path / "scene.tif", random_pixels((4, 70, 60))))


def expected(model: str, image: torch.Tensor) -> torch.Tensor:
    network = load_model(model.partition("#")[0])
    with torch.no_grad():
        return network.main(image)  # type: ignore[operator, union-attr]


def options(networks: str, name: str, folder: Path, routed: bool = False) -> Options:
    model, route = f"{networks}:{name}", None
    if routed:
        route = folder / "ROUTE.toml"
        route.write_text(f'region = 32\nbudget = 0.5\n[cheap]\nmodel = "{model}"\n')
    return Options(model, scale=255, dtype="float32", output="logits", format="zarr", route=route)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", CLEAR)
def test_process_and_stream_take_the_same(
    networks: str, scene: str, tmp_path: Path, name: str, routed: bool
) -> None:
    wishes = options(networks, name, tmp_path, routed)
    run_scene((scene,), tmp_path / "out.zarr", wishes)
    image = torch.from_numpy(random_pixels((4, 70, 60)).astype(np.float32)) / 255
    whole = expected(wishes.model, image[None])[0]
    found = open_raster(tmp_path / "out.zarr").read()
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
    network = load_model(wishes.model)
    torch.testing.assert_close(main_output(network(image[None]))[0], whole)
    torch.testing.assert_close(StreamedModel(network, (4, 70, 60))(image)[0], whole)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", UNCLEAR)
def test_process_and_plan_refuse_the_same(
    networks: str, scene: str, tmp_path: Path, name: str, routed: bool
) -> None:
    wishes = options(networks, name, tmp_path, routed)
    with pytest.raises(OutputError, match=r"returns 2 tensors.*#"):
        run_scene((scene,), tmp_path / "out.zarr", wishes)
    with pytest.raises(OutputError, match=r"returns 2 tensors.*#"):
        plan(scene, replace(wishes, route=None))
    with pytest.raises(OutputError):
        StreamedModel(load_model(wishes.model), (4, 70, 60))


@pytest.mark.parametrize("crop", [0, 32])
def test_training_learns_the_same(networks: str, tmp_path: Path, crop: int) -> None:
    wishes = TrainOptions(
        f"{networks}:features#1", epochs=1, steps_per_epoch=1, crop=crop, batch=1, scale=255
    )
    result = train(write_pairs(tmp_path), tmp_path / "run", wishes, quiet)
    before = load_model(f"{networks}:features").state_dict()
    after = load_model(f"{networks}:features", result.weights).state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.partition(".")[0] for key in moved} == {"main"}


@pytest.mark.parametrize("name", UNCLEAR)
def test_training_refuses_the_same_before_a_run_is_made(networks: str, tmp_path: Path, name: str) -> None:
    wishes = TrainOptions(f"{networks}:{name}", crop=32, scale=255)
    with pytest.raises(OutputError, match=r"returns 2 tensors.*#"):
        train(write_pairs(tmp_path), tmp_path / "run", wishes, quiet)
    assert not (tmp_path / "run").exists()
