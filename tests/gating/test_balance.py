import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import BiasBalancer, Gate, TopK

loads = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=8)


@given(loads)
def test_the_bias_is_the_loop_with_mean_zero(steps: list[list[int]]) -> None:
    balancer = BiasBalancer(3, rate=0.25)
    bias = [0.0] * 3
    for load in steps:
        balancer.observe(torch.tensor(load))
        balancer.update()
        mean = sum(load) / 3
        signs = [(count < mean) - (count > mean) for count in load]
        bias = [b + 0.25 * (s - sum(signs) / 3) for b, s in zip(bias, signs, strict=True)]
        assert balancer.bias.tolist() == pytest.approx(bias, abs=1e-6)
        assert abs(float(balancer.bias.double().sum())) < 1e-6
        assert (balancer.counts == 0).all()


def test_counts_are_exact_past_2_to_the_24() -> None:
    balancer = BiasBalancer(2)
    balancer.observe(torch.tensor([2**24, 2**24]))
    balancer.observe(torch.tensor([[True, False]]))  # float32 would lose this one
    assert balancer.counts.tolist() == [2**24 + 1, 2**24]
    balancer.update()
    assert balancer.bias[0] < 0 < balancer.bias[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_does_not_touch_the_counters(dtype: torch.dtype) -> None:
    balancer = BiasBalancer(2, rate=1e-3).to(dtype)
    for _ in range(1000):  # from 1 on, a bf16 bias would no longer move by 1e-3
        balancer.observe(torch.tensor([3, 1]))
        balancer.update()
    assert balancer.counts.dtype == torch.int64 and balancer.bias.dtype == torch.float32
    assert balancer.bias.tolist() == pytest.approx([-1.0, 1.0])


def test_it_balances_a_skewed_router() -> None:
    generator = torch.Generator().manual_seed(0)
    skew = torch.tensor([1.5, 0.5, 0.0, -0.5])
    balancer = BiasBalancer(4, rate=5e-3)
    gate = Gate(lambda x: x, TopK(1), balancer=balancer)

    def load() -> torch.Tensor:
        gated = gate(torch.randn(2000, 4, generator=generator) + skew)
        gate.observe(gated)
        gate.advance()
        return gated.mask.float().mean(0)

    before = load()
    for _ in range(150):
        after = load()
    assert before.max() > 0.6 and after.max() < 0.3 and after.min() > 0.2


def test_a_single_expert_stays_at_zero() -> None:
    balancer = BiasBalancer(1)
    balancer.observe(torch.tensor([5]))
    balancer.update()
    assert balancer.bias.tolist() == [0.0]


def test_bad_input_is_refused_with_its_values() -> None:
    with pytest.raises(ValueError, match=r"got 0 and 0\.001"):
        BiasBalancer(0)
    with pytest.raises(ValueError, match=r"got torch.float32 \[3\]"):
        BiasBalancer(3).observe(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got torch.bool \[4, 2\]"):
        BiasBalancer(3).observe(torch.zeros(4, 2, dtype=torch.bool))
