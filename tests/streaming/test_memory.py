"""Memory depends on the width, not on the height; what is predicted is what is taken."""

import json
import subprocess
import sys

import pytest
import torch
from networks import NETWORKS
from torch import nn

from bigvision.graph import fold_batch_norm, trace
from bigvision.streaming.footprint import forward_bytes
from bigvision.streaming.program import compile_program

# One process a measurement: its own peak, and how much of it came with the scene.
MEASURE = """
import json, resource, sys
import torch, segmentation_models_pytorch as smp
from bigvision.streaming import StreamedModel
torch.set_num_threads(1)
width, height, rows = map(int, sys.argv[1:4])
dtype = getattr(torch, sys.argv[4])
class Scene:
    shape = (3, height, width)
    def __getitem__(self, key):
        a, b, _ = key[1].indices(height)
        return torch.ones(3, b - a, width)
def run(shape):
    network = smp.Unet("resnet18", encoder_weights=None, classes=4)
    model = StreamedModel(network, shape, rows=rows, dtype=dtype)
    scene = Scene() if shape == Scene.shape else torch.ones(shape)
    for _ in model.stream(scene):
        pass
    return model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
run((3, 64, 64))  # libraries and their scratch
before = peak()
model = run(Scene.shape)
print(json.dumps([peak(), peak() - before, model.plan.engine_bytes]))
"""


def measured(width: int, height: int, rows: int, dtype: str) -> tuple[int, int, int]:
    """(peak, growth, predicted growth) in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(width), str(height), str(rows), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_peak_does_not_grow_with_the_height() -> None:
    low, high = (measured(512, height, 32, "float32")[0] for height in (1024, 4096))
    assert high <= 1.1 * low


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_growth_is_as_predicted(dtype: str) -> None:
    _, growth, predicted = measured(4096, 768, 64, dtype)
    assert growth == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize(
    "name", ["Unet-resnet18", pytest.param("FPN-efficientnet-b0", marks=pytest.mark.slow)]
)
def test_predictions_depend_on_the_width_alone(name: str) -> None:
    found = {}
    model: nn.Module = NETWORKS[name]().eval()
    for height, width in [(1024, 256), (8192, 256), (1024, 512)]:
        program = compile_program(fold_batch_norm(trace(model, (3, height, width))))
        found[height, width] = forward_bytes(program, 32, torch.float32)
    weights = sum(t.numel() * t.element_size() for t in program.traced.tensors.values())
    assert found[8192, 256] == pytest.approx(found[1024, 256], rel=0.02)
    assert found[1024, 512] - weights == pytest.approx(2 * (found[1024, 256] - weights), rel=0.05)
