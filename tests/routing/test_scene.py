"""A scene routed from a source that is read by windows, against both networks over the whole of it."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.windows import Window
from routing_networks import Hourglass, convolutions
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from bigvision.routing.boxes import Box
from bigvision.routing.merging import merge, singles
from bigvision.routing.pixel import entropy, margin
from bigvision.routing.route_file import RouteSpec
from bigvision.routing.scene import CHEAP, FULL, SceneRouter

REGION = 16


class Memory:
    """A scene in memory that counts what is read."""

    def __init__(self, pixels: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
        self.pixels, self.valid = np.where(valid, pixels, 0).astype(np.float32), valid
        self.read_pixels = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pixels.shape

    def read(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        rows, cols = window.toslices()
        self.read_pixels += window.width * window.height
        return self.pixels[:, rows, cols].copy(), self.valid[rows, cols].copy()


class Canvas:
    """Where results go."""

    def __init__(self, classes: int, height: int, width: int) -> None:
        self.logits = torch.full((classes, height, width), torch.nan)

    def emit(self, window: Window, logits: Tensor, valid: NDArray[np.bool_]) -> None:
        rows, cols = window.toslices()
        assert logits.shape[1:] == valid.shape == (window.height, window.width)
        self.logits[:, rows, cols] = logits


def whole(network: torch.nn.Module, source: Memory, stride: int) -> Tensor:
    _, height, width = source.shape
    padded = functional.pad(torch.from_numpy(source.pixels), (0, -width % stride, 0, -height % stride))
    with torch.no_grad():
        return network(padded[None])[0, :, :height, :width]


def setup(budget: float = 0.3, max_pixels: int = 4 * REGION**2, **more: object) -> tuple[SceneRouter, Memory]:
    torch.manual_seed(0)
    cheap, full = convolutions(2, 3).eval(), Hourglass(2, 3).eval()
    generator = np.random.default_rng(0)
    valid = np.ones((75, 90), bool)
    valid[:40, :50] = False  # regions without data, and regions with some
    source = Memory(generator.normal(size=(2, 75, 90)), valid)
    spec = RouteSpec("a.b:c", region=REGION, budget=budget, **more)
    return SceneRouter(source, cheap, full, spec, max_pixels=max_pixels), source


@pytest.mark.parametrize(
    ("max_pixels", "gate"), [(REGION**2, "entropy"), (4 * REGION**2, "margin"), (10**6, "entropy")]
)
def test_every_region_is_its_network_over_the_whole_scene(max_pixels: int, gate: str) -> None:
    router, source = setup(max_pixels=max_pixels, gate=gate)
    canvas = Canvas(3, 75, 90)
    score, data = np.zeros(router.grid, np.float32), np.zeros(router.grid, bool)
    for box in router.blocks():
        block = router.score(box, canvas.emit)
        score[box.top : box.bottom, box.left : box.right] = block.score
        data[box.top : box.bottom, box.left : box.right] = block.data
    cheap = whole(router.experts[CHEAP].module, source, 1)
    doubt = {"entropy": entropy, "margin": margin}[gate](cheap[None])[0]
    for r, c in np.ndindex(*router.grid):
        part = (slice(r * REGION, (r + 1) * REGION), slice(c * REGION, (c + 1) * REGION))
        shown = torch.from_numpy(source.valid[part])
        assert data[r, c] == bool(shown.any())
        assert np.isclose(score[r, c], doubt[part][shown].mean() if shown.any() else 0, atol=1e-5)
    expert = router.decide(score, data)
    assert ((expert < 0) == ~data).all() and (expert == FULL).sum() == int(0.3 * data.sum())
    assert score[expert == FULL].min() >= score[expert == CHEAP].max()
    for rectangle in router.rectangles(expert == FULL, FULL):
        router.compute(FULL, rectangle, canvas.emit)
    chosen = torch.from_numpy(expert).repeat_interleave(REGION, 0).repeat_interleave(REGION, 1)[:75, :90]
    expected = torch.where(chosen == FULL, whole(router.experts[FULL].module, source, 8), cheap)
    expected = torch.where(chosen < 0, torch.nan, expected)
    assert torch.allclose(canvas.logits, expected, atol=1e-4, equal_nan=True)
    plan = router.plan(expert)
    assert plan.experts[FULL].regions == (expert == FULL).sum() and 0 < plan.share < 2


def test_a_scene_without_data_computes_nothing() -> None:
    router, source = setup()
    source.valid[:] = False
    canvas = Canvas(3, 75, 90)
    blocks = [router.score(box, canvas.emit) for box in router.blocks()]
    assert not any(block.data.any() for block in blocks) and canvas.logits.isnan().all()
    nothing = router.decide(np.zeros(router.grid, np.float32), np.zeros(router.grid, bool))
    assert (nothing == -1).all() and router.plan(nothing).cost == 0


def test_a_threshold_leaves_budget_unspent() -> None:
    router, _ = setup(budget=1.0, threshold=0.5)
    score = np.linspace(0, 1, 30, dtype=np.float32).reshape(router.grid)
    score[0, 0] = 0.5
    expert = router.decide(score, np.ones(router.grid, bool))
    assert ((expert == FULL) == (score >= 0.5)).all()


def test_a_learned_gate_decides_by_its_features(tmp_path: Path) -> None:
    weight = torch.zeros(2, 6)
    weight[FULL, 0] = 5.0  # the mean of the first channel
    save_file({"weight": weight, "bias": torch.zeros(2)}, tmp_path / "gate.safetensors")
    router, source = setup(gate="learned", gate_weights=tmp_path / "gate.safetensors", max_pixels=10**6)
    block = router.score(next(router.blocks()), lambda *_: None)
    part = (slice(64, 75), slice(0, 16))
    expected = 1 / (1 + np.exp(-5 * source.pixels[0][part].mean()))
    assert np.isclose(block.score[4, 0], expected, atol=1e-5)
    save_file({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, tmp_path / "gate.safetensors")
    with pytest.raises(ValueError, match=r"\[2, 4\].*6 features"):
        setup(gate="learned", gate_weights=tmp_path / "gate.safetensors")
    (tmp_path / "gate.safetensors").write_text("no")
    with pytest.raises(ValueError, match="no learned gate"):
        setup(gate="learned", gate_weights=tmp_path / "gate.safetensors")


def test_networks_that_do_not_fit_are_refused() -> None:
    source = Memory(np.zeros((2, 20, 20), np.float32), np.ones((20, 20), bool))
    cheap, full = convolutions(2, 3).eval(), Hourglass(2, 3).eval()
    with pytest.raises(ValueError, match=r"12 px.*full.*8 px"):
        SceneRouter(source, cheap, full, RouteSpec("a.b:c", region=12))
    with pytest.raises(ValueError, match=r"4 channels.*3"):
        SceneRouter(source, convolutions(2, 4).eval(), full, RouteSpec("a.b:c", region=16))
    with pytest.raises(ValueError, match=r"'full'.*2 channels"):
        SceneRouter(source, cheap, Hourglass(5, 3).eval(), RouteSpec("a.b:c", region=16))


def cells(boxes: Iterator[Box]) -> list[tuple[int, int]]:
    return [cell for b in boxes for cell in itertools.product(range(b.top, b.bottom), range(b.left, b.right))]


@settings(max_examples=60)
@given(
    st.integers(0, 9), st.integers(0, 9), st.floats(0, 1), st.integers(0, 2**31), st.floats(0, 4),
    st.integers(1, 90),
)  # fmt: skip
def test_rectangles_partition_the_selection_and_never_cost_more(
    rows: int, cols: int, share: float, seed: int, halo: float, limit: int
) -> None:
    mask = np.random.default_rng(seed).random((rows, cols)) < share

    def price(box: Box) -> float:
        return (box.height + 2 * halo) * (box.width + 2 * halo)

    found = merge(mask, price, limit)
    kept = cells(cell for one in found for cell in one.cells)
    assert sorted(kept) == sorted(zip(*(axis.tolist() for axis in mask.nonzero()), strict=True))
    assert all(one.box.area <= max(limit, 1) and all(map(one.box.holds, one.cells)) for one in found)
    assert sum(price(one.box) for one in found) <= sum(price(one.box) for one in singles(mask)) + 1e-9


def test_a_hole_is_computed_where_its_halo_would_cost_more() -> None:
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    (one,) = merge(ring, lambda box: (box.height + 4) * (box.width + 4), 100)
    assert one.box == Box(0, 0, 3, 3) and sum(cell.area for cell in one.cells) == 8
    assert len(merge(ring, lambda box: box.area, 100)) > 1
    with pytest.raises(ValueError, match="0"):
        merge(ring, lambda box: box.area, 0)


def test_each_network_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    export = torch.export.export

    def counted(model: torch.nn.Module, *given: object, **more: object) -> object:
        traced.append(type(model.network).__name__)
        return export(model, *given, **more)

    monkeypatch.setattr(torch.export, "export", counted)
    router, _ = setup()
    router.trace()
    assert traced == ["Sequential", "Hourglass"]
