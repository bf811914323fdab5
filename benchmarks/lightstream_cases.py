"""What lightstream makes of the building blocks of networks: forward and gradient against the whole image.

    python benchmarks/lightstream_cases.py              all cases, each in a process of its own
    python benchmarks/lightstream_cases.py dilation     one of them

float64, a 3-band image larger than the tile. lightstream streams in tiles whose lost borders it measures by
running a network of constants with everything but convolutions and pools taken out; the table says where that
gives the whole image's result and where it doesn't. Ours is `StreamedModel` on the same network; its gradient
needs an output at the image's own size.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from bigvision.streaming import StreamedModel
from bigvision.streaming.losses import SquaredError


class Residual(nn.Module):
    """x + conv(conv(x)), the skip of a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).relu())


class Joined(nn.Module):
    """The skip of a U-Net: pooled, upsampled, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.head = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.up(self.down(x))], 1))


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())


def conv(**options: int) -> nn.Module:
    return nn.Conv2d(8, 8, 3, **options)


# name -> (network, image side, tile side)
CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "convolutions": (lambda: nn.Sequential(stem(), conv(padding=1), nn.ReLU(), conv(padding=1)), 192, 128),
    "strides and pools": (
        lambda: nn.Sequential(stem(), nn.MaxPool2d(2), conv(padding=1, stride=2), nn.ReLU(), conv(padding=1)),
        192,
        128,
    ),
    "dilation": (
        lambda: nn.Sequential(stem(), conv(padding=2, dilation=2), nn.ReLU(), conv(padding=1)),
        192,
        128,
    ),
    "residual skip": (lambda: nn.Sequential(stem(), Residual(), conv(padding=1)), 192, 128),
    "upsampling": (
        lambda: nn.Sequential(
            stem(), nn.MaxPool2d(2), conv(padding=1), nn.Upsample(scale_factor=2), conv(padding=1)
        ),
        192,
        128,
    ),
    "U-Net skip": (lambda: nn.Sequential(stem(), Joined()), 192, 128),
    "Unet-resnet18": (
        lambda: smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=2),
        832,
        768,
    ),
}


def engine() -> types.ModuleType:
    """lightstream's own streaming code; its package imports `lightning`, which it doesn't declare."""
    if "lightstream" not in sys.modules:
        found = importlib.util.find_spec("lightstream")
        if found is None or found.submodule_search_locations is None:
            raise SystemExit("lightstream is not installed: pip install 'bigvision[benchmarks]'")
        package = types.ModuleType("lightstream")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["lightstream"] = package
    if not torch.cuda.is_available():  # on import it asks the driver about bfloat16, and fails without one
        torch.cuda.is_bf16_supported = lambda *_: False
    return importlib.import_module("lightstream.core.constructor")


def streaming_form(model: nn.Module, tile: int) -> Any:
    """lightstream's form of a network. It measures on the CPU and then moves to CUDA, where there is one."""
    constructor = engine().StreamingConstructor(model, tile, verbose=False, normalize_on_gpu=False)
    if torch.cuda.is_available():
        return constructor.prepare_streaming_model()
    nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign]
    streaming = constructor.prepare_streaming_model()
    streaming.device = torch.device("cpu")
    return streaming


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def lightstream_errors(name: str) -> list[str]:
    """Forward and gradient of one case, or why there is none."""
    make, side, tile = CASES[name]
    torch.manual_seed(0)
    model, image = make().double().eval(), torch.randn(1, 3, side, side, dtype=torch.float64)
    whole = model(image)
    (whole.square().mean()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    told: list[str] = []
    try:
        streaming = streaming_form(copy.deepcopy(model), tile)
        found = streaming(image)
        if found.shape != whole.shape:
            told.append(f"wrong: {tuple(found.shape[2:])} pixels for {tuple(whole.shape[2:])}")
        else:
            told.append(verdict(relative(found, whole.detach())))
        streaming.stream_module.zero_grad()
        streaming.backward(image, 2 * whole.detach() / whole.numel())
        own = dict(streaming.stream_module.named_parameters())
        told.append(verdict(max(gradient_error(own[key].grad, one) for key, one in gradients.items())))
    except Exception as error:
        told.append(f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:70]}")
    return [*told, "-"][:2]


def gradient_error(found: Tensor | None, expected: Tensor | None) -> float:
    """Relative; 1 where a gradient is missing."""
    if expected is None or not expected.any():
        return 0.0
    return 1.0 if found is None else relative(found, expected)


def verdict(error: float) -> str:
    return f"{error:.0e}" if error < 1e-6 else f"wrong: {error:.0e}"


def our_errors(name: str) -> list[str]:
    """The same of `StreamedModel`, 16 rows a step."""
    make, side, _ = CASES[name]
    torch.manual_seed(0)
    model, image = make().double().eval(), torch.randn(1, 3, side, side, dtype=torch.float64)
    whole = model(image)
    streamed = StreamedModel(model, (3, side, side), rows=16, dtype=torch.float64)
    told = [verdict(relative(streamed(image[0]), whole.detach()))]
    if whole.shape[2:] != image.shape[2:]:
        return [*told, "-"]
    target, loss = torch.zeros(whole.shape[1:], dtype=torch.float64), SquaredError()
    loss(whole, target[None]).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    streamed.backward(image[0], target, loss)
    pairs = zip(model.parameters(), gradients, strict=True)
    return [*told, verdict(max(gradient_error(p.grad, one) for p, one in pairs))]


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if given[1:] == ["--alone"]:
        name = given[0]
        ours = our_errors(name)  # first: a failure of the other may leave torch without gradients
        print("| " + " | ".join([name, *lightstream_errors(name), *ours]) + " |")
        return
    print("| network | lightstream forward | lightstream gradient | ours forward | ours gradient |")
    print("|---|---|---|---|---|", flush=True)
    for name in given or CASES:
        command = [sys.executable, str(Path(__file__)), name, "--alone"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
        print(
            lines[-1] if lines else f"| {name} | dies with exit status {done.returncode} | - | - | - |",
            flush=True,
        )


if __name__ == "__main__":
    main()
