"""Windows cut and pasted against slices, in memory of torch's and of NumPy's."""

import pytest
import torch
from torch import Tensor

from bigvision.routing import Box, pasting
from bigvision.routing.pasting import Place, cut, paste

BOXES = [Box(0, 0, 3, 4), Box(2, 5, 5, 9), Box(4, 1, 7, 5)]
PLACES: list[Place] = [(0, BOXES[0]), (1, BOXES[1]), (1, BOXES[2])]


@pytest.fixture(params=["small", "large"], autouse=True)
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "large":
        monkeypatch.setattr(pasting, "_KEPT", 0)
        monkeypatch.setattr(pasting, "_HUGE_PAGES", 0)


def sliced(x: Tensor, places: list[Place]) -> Tensor:
    return torch.stack([x[i, :, b.top : b.bottom, b.left : b.right] for i, b in places])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_are_slices_in_the_layout_and_dtype_of_the_image(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
    windows = cut(x, PLACES)
    assert torch.equal(windows, sliced(x, PLACES))
    image = paste(x.shape, [(windows, PLACES)], like=x, alone=True)
    expected = torch.zeros_like(x)
    for (i, b), window in zip(PLACES, windows, strict=True):
        expected[i, :, b.top : b.bottom, b.left : b.right] = window
    assert torch.equal(image, expected)
    for made in (windows, image):
        assert made.dtype == dtype and made.is_contiguous(memory_format=layout)
        assert made.data_ptr() % 64 == 0
    everywhere: list[Place] = [(i, Box(0, 0, 7, 9)) for i in range(2)]
    assert torch.equal(paste(x.shape, [(x, everywhere)], like=x, alone=True), x)


def test_they_are_adjoint_and_overlapping_windows_add_up() -> None:
    places: list[Place] = [(0, Box(0, 0, 3, 4)), (0, Box(1, 2, 4, 6)), (1, Box(0, 0, 3, 4))]
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    windows = torch.randn(3, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    image = paste(x.shape, [(windows, places)], like=x)
    assert torch.allclose((cut(x, places) * windows).sum(), (x * image).sum())
    assert torch.autograd.gradcheck(lambda a: cut(a, places), (x,))
    assert torch.autograd.gradcheck(lambda a: paste(x.shape, [(a, places)], like=x), (windows,))


def test_large_images_are_zeros_where_nothing_was_pasted() -> None:
    """Truly large, so that huge pages and their zeroing are the system's own."""
    like = torch.zeros(1, 1, 1, 1)
    for _ in range(2):  # the second time in memory that the first gave back
        window = torch.ones(1, 2, 64, 64)
        image = paste((1, 2, 1024, 1024), [(window, [(0, Box(960, 960, 1024, 1024))])], like=like)
        assert image.sum() == window.numel() and image[..., 960:, 960:].all()
        image.fill_(7)
