"""The network of boosted trees: its features by plain loops, streamed and in windows like the whole."""

import numpy as np
import pytest
import torch
from photographs import photograph
from torch import nn
from vegetation_network import DARK, Surroundings, VegetationTrees, trees

from bigvision.streaming import StreamedModel


def image(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels[None, :3].astype(np.float32))


def by_loops(pixels: np.ndarray, windows: tuple[int, ...]) -> np.ndarray:
    """Features in float64, [F, H, W]: what `Surroundings` promises, pixel by pixel."""
    rgb = pixels[:3].astype(np.float64)
    total = rgb.sum(0)
    seen = total > 0
    light = np.where(seen, total / total[seen].mean(), 0)
    centred = np.where(seen, light - 1, 0)
    laplacian = np.zeros_like(total)
    for r, c in zip(*np.nonzero(seen), strict=True):
        for at in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            if 0 <= at[0] < len(total) and 0 <= at[1] < total.shape[1] and seen[at]:
                laplacian[r, c] += light[at] - light[r, c]
    grain = np.where(seen, abs(laplacian) / (light + DARK), 0)
    shares = np.where(seen, rgb[:2] / np.maximum(total, 1) - 1 / 3, 0)
    colour = np.concatenate([shares, centred[None]])
    found = [colour]
    for size in windows:
        local = np.zeros((7, *total.shape))
        for r, c in np.ndindex(*total.shape):
            part = np.s_[max(r - size // 2, 0) : r + size // 2 + 1, max(c - size // 2, 0) : c + size // 2 + 1]
            known = seen[part]
            if known.any():
                inside = colour[:, *part][:, known]
                local[:, r, c] = [*inside.mean(1), *inside.var(1), grain[part][known].mean()]
        found.append(local)
    return np.concatenate(found)


def test_features_are_those_of_plain_loops_at_edges_and_beside_nodata() -> None:
    pixels = photograph(0, shape=(24, 19))
    pixels[:, 5:16, 3:12] = 0  # a hole in which windows of 7 see nothing at all
    found = Surroundings((3, 7))(image(pixels))[0].numpy()
    np.testing.assert_allclose(found, by_loops(pixels, (3, 7)), rtol=2e-4, atol=2e-6)


def test_a_flight_s_exposure_makes_no_difference() -> None:
    pixels = photograph(0).astype(np.float32)
    network = Surroundings((3, 15))
    np.testing.assert_allclose(network(image(pixels)), network(image(0.37 * pixels)), rtol=1e-3, atol=1e-5)


def test_an_exposure_that_is_given_is_the_one_that_is_found() -> None:
    pixels = photograph(0)
    pixels[:, :9] = 0
    exposure = float(pixels[:3].sum(0, dtype=np.float64)[9:].mean())
    found, given = Surroundings()(image(pixels)), Surroundings(exposure=exposure)(image(pixels))
    np.testing.assert_allclose(given, found, rtol=1e-3, atol=1e-5)


def test_an_image_without_data_stays_finite() -> None:
    assert Surroundings()(torch.zeros(1, 3, 9, 9)).isfinite().all()


def random_trees(seed: int, **given: int) -> VegetationTrees:
    network = trees(**given)
    draw = torch.Generator().manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=0.3, generator=draw)
            nn.init.normal_(part.bias, std=0.3, generator=draw)
    return network.eval()


@pytest.mark.parametrize("rows", [1, 16, 200])
def test_the_streamed_network_is_the_whole_one(rows: int) -> None:
    """Weights without the steep steps of trees, so that rounding can be told from a mistake."""
    pixels = photograph(1)
    pixels[:, 40:90, 20:30] = 0
    network = random_trees(0, trees=7, leaves=4)
    with torch.inference_mode():
        whole = network(image(pixels))[0]
        streamed = StreamedModel(network, (3, 150, 130), rows=rows)(image(pixels)[0])[0]
    np.testing.assert_allclose(streamed, whole, rtol=1e-4, atol=1e-4)
