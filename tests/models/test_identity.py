"""Two networks are one only where they compute the same."""

import torch
from torch import Tensor, nn

from bigvision.graph.trace import trace
from bigvision.models.identity import architecture_hash, graph_hash, state_hash


class Net(nn.Module):
    """Its pixels depend on what no weight and no text of it tells."""

    def __init__(self, gain: float = 2.0, offset: float = 0.0, kept: bool = True, table: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.register_buffer("offset", torch.tensor(offset), persistent=kept)
        self.table = [torch.tensor([table])]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.offset + self.table[0]


def hashes(net: nn.Module) -> tuple[str, str, str]:
    return state_hash(net), architecture_hash(net), graph_hash(trace(net, (1, 8, 8)), net)


def test_what_decides_the_pixels_is_in_it() -> None:
    one = hashes(Net())
    assert hashes(Net()) == one
    for other in (Net(gain=3.0), Net(table=2.0), Net(offset=1.0), Net(offset=1.0, kept=False)):
        assert hashes(other) != one


def test_an_address_in_memory_is_not() -> None:
    class Named(nn.Module):
        def extra_repr(self) -> str:
            return repr(object())

    assert architecture_hash(Named()) == architecture_hash(Named())
