"""Traced graphs: live tensors under their names, nested outputs, and refusals in one sentence."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigvision.graph import UntraceableError, trace
from bigvision.graph.trace import module_path, operator_name, result_shape


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 3, padding=1)
        self.b = self.a
        self.register_buffer("scale", torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.b(self.a(x)) * self.scale + torch.tensor(3.0), "aux": x}


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_tensors_are_the_networks_own_and_named() -> None:
    model = Shared()
    traced = trace(model, (2, 8, 9))
    named = dict(traced.parameters())
    assert {id(tensor) for tensor in named.values()} == {id(p) for p in model.parameters()}
    assert all(name.split(".")[0] in ("a", "b") for name in named)
    assert "scale" in traced.names.values()
    assert any(tensor is model.scale for tensor in traced.tensors.values())


def test_outputs_keep_their_nesting() -> None:
    traced = trace(Shared(), (2, 8, 9))
    result = traced.rebuild(list(traced.outputs))
    assert set(result) == {"out", "aux"}
    assert result_shape(result["out"]) == (1, 2, 8, 9)
    assert result["aux"] is traced.image


def test_true_sizes_cost_no_memory() -> None:
    traced = trace(nn.Sequential(nn.Conv2d(4, 64, 3, 2, 1), nn.ReLU()), (4, 30016, 30016))
    (output,) = traced.outputs
    assert result_shape(output) == (1, 64, 15008, 15008)
    assert [(operator_name(n), module_path(n)) for n in traced.operators()] == [
        ("conv2d", "0"),
        ("relu", "1"),
    ]


def test_checks_of_dtypes_are_no_operators() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1, keepdim=True).to(x.dtype)

    assert "_assert_tensor_metadata" not in [operator_name(n) for n in trace(Cast(), (2, 4, 4)).operators()]


def test_weights_are_free_as_soon_as_a_trace_is() -> None:
    """However many networks and sizes, without waiting for a search for circles."""
    before = gc.isenabled()
    gc.disable()
    try:
        for size in (8, 9, 10):
            model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
            weight = weakref.ref(model[0].weight)
            traced = trace(model, (2, size, 9))
            del model, traced
            assert weight() is None
    finally:
        if before:
            gc.enable()
    assert gc.get_freeze_count() == 0
    assert FakeTensorMode.cache_info().size == 0  # it holds an entry of every operator at every size


def test_control_flow_on_pixels_is_refused() -> None:
    with pytest.raises(UntraceableError, match=r"Branches can't be traced at \(1, 4, 4\).*torch\.where"):
        trace(Branches(), (1, 4, 4))


@pytest.mark.parametrize("shape", [(3, 2, 2), (2, 8, 8)])
def test_images_that_the_network_refuses(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"Sequential does not run on an image of"):
        trace(nn.Sequential(nn.Conv2d(3, 1, 7)), shape)


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (3, 4)])
def test_shapes_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="all positive"):
        trace(nn.Conv2d(3, 1, 1), shape)  # type: ignore[arg-type]


def test_a_network_is_traced_within_inference_mode() -> None:
    """Where scenes are computed; the graph is the one that gradients are taken of, too."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.inference_mode():
        within = [str(node.target) for node in trace(network, (3, 32, 32)).operators()]
    assert within == [str(node.target) for node in trace(network, (3, 32, 32)).operators()]
