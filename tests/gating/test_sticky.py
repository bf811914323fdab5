import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import Gate, StickyScores, TopK

visits = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=5)


@given(visits, st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.3, 1.0]))
def test_memory_is_the_loop(batches: list[list[int]], decay: float, strength: float) -> None:
    sticky = StickyScores(4, 2, decay=decay, strength=strength)
    memory: dict[int, torch.Tensor] = {}
    for batch in batches:
        scores, items = torch.rand(len(batch), 2), torch.tensor(batch, dtype=torch.int64)
        blended = sticky.blend(scores, items)
        for row, item, score in zip(blended, batch, scores, strict=True):
            torch.testing.assert_close(row, (1 - strength) * score + strength * memory.get(item, score))
        sticky.observe(scores, items)
        for item in set(batch):
            mean = scores[[i for i, other in enumerate(batch) if other == item]].mean(0)
            memory[item] = decay * memory.get(item, mean) + (1 - decay) * mean
    for item in range(4):
        assert bool(sticky.seen[item]) == (item in memory)
        if item in memory:
            torch.testing.assert_close(sticky.average[item], memory[item])


def test_a_sticky_gate_changes_its_mind_less_often() -> None:
    generator = torch.Generator().manual_seed(0)
    base, items = torch.randn(50, 4, generator=generator), torch.arange(50)

    def flips(strength: float) -> int:
        gate = Gate(lambda x: x, TopK(1), sticky=StickyScores(50, 4, decay=0.8, strength=strength))
        noise = torch.Generator().manual_seed(1)
        masks = []
        for _ in range(12):
            gated = gate(base + 0.7 * torch.randn(50, 4, generator=noise), items=items)
            gate.observe(gated)
            masks.append(gated.mask)
        return sum(int((a != b).any(1).sum()) for a, b in itertools.pairwise(masks))

    assert flips(0.8) < 0.5 * flips(0.0)


def test_bad_input_is_refused_with_its_values() -> None:
    with pytest.raises(ValueError, match=r"got 1\.0 and 0\.5"):
        StickyScores(2, 2, decay=1.0)
    sticky = StickyScores(3, 2)
    with pytest.raises(ValueError, match=r"in \[0, 3\), got 1 to 3"):
        sticky.blend(torch.zeros(2, 2), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"got \[2, 4\] and torch.int64 \[2\]"):
        sticky.observe(torch.zeros(2, 4), torch.tensor([0, 1]))
