"""Hard experts, soft experts and the dense loop give the same numbers; only hard ones skip work."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bigvision.gating import (
    Experts,
    Routing,
    apply_experts,
    apply_experts_soft,
    dense_weights,
    normalize,
    route,
    run_experts,
    top_k,
)


class Counted(nn.Module):
    """A small network that notes how many rows each call had."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(2, 3, generator=generator, dtype=torch.float64))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return (x @ self.weight.t()).sin()


cases = st.tuples(st.integers(0, 7), st.integers(1, 5), st.integers(0, 6), st.integers(0, 999))


def make(case: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, list[Counted]]:
    """Tokens, logits, a mask and experts."""
    t, e, k, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(t, e, generator=generator, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(t, e, generator=generator) < 0.7
    return x, logits, top_k(logits, k, allowed=allowed), [Counted(i) for i in range(e)]


def slow(x: Tensor, probs: Tensor, mask: Tensor, experts: list[Counted]) -> Tensor:
    """A loop over tokens, then over experts."""
    out = [x.new_zeros(2) for _ in x]
    for t in range(len(x)):
        for e, expert in enumerate(experts):
            if mask[t, e]:
                out[t] = out[t] + probs[t, e] * expert(x[t : t + 1])[0]
    return torch.stack(out) if out else x.new_zeros(0, 2)


def outcome(run: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of its weighted sum."""
    for leaf in leaves:
        leaf.grad = None
    out = run()
    if out.requires_grad:
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
    return [out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


@given(cases)
def test_hard_is_soft_is_the_loop_forward_and_backward(case: tuple[int, int, int, int]) -> None:
    x, logits, mask, experts = make(case)
    leaves = [x, logits, *(expert.weight for expert in experts)]
    want = outcome(lambda: slow(x, normalize(logits), mask, experts), leaves)
    for run in (
        lambda: apply_experts(x, route(mask, normalize(logits)), experts, out_shape=(2,)),
        lambda: apply_experts_soft(x, route(mask, normalize(logits)), experts),
        lambda: Experts(experts, zero_idle=True)(x, route(mask | ~mask.any(), normalize(logits))),
    )[: 3 if mask.any() else 2]:
        for have, expected in zip(outcome(run, leaves), want, strict=True):
            torch.testing.assert_close(have, expected)


@given(cases)
def test_with_k_equal_to_n_both_are_the_dense_mixture(case: tuple[int, int, int, int]) -> None:
    x, logits, _, experts = make(case)
    if not len(x):
        return
    every = torch.ones_like(logits, dtype=torch.bool)
    leaves = [x, logits, *(expert.weight for expert in experts)]

    def dense() -> Tensor:
        outputs = torch.stack([expert(x) for expert in experts], 1)
        return (normalize(logits)[..., None] * outputs).sum(1)

    want = outcome(dense, leaves)
    for mode in ("hard", "soft"):
        model = Experts(experts, mode=mode)  # type: ignore[arg-type]
        for have, expected in zip(
            outcome(lambda model=model: model(x, route(every, normalize(logits))), leaves),
            want,
            strict=True,
        ):
            torch.testing.assert_close(have, expected)


@given(cases)
def test_rows_that_enter_an_expert_are_its_count_and_none_is_no_call(case: tuple[int, int, int, int]) -> None:
    x, logits, mask, experts = make(case)
    routing = route(mask, normalize(logits))
    apply_experts(x, routing, experts)
    for expert, count in zip(experts, routing.counts.tolist(), strict=True):
        assert expert.calls == ([count] if count else [])


@given(cases, st.integers(0, 99))
def test_equivariance_to_tokens_and_experts(case: tuple[int, int, int, int], seed: int) -> None:
    x, logits, mask, experts = make(case)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(len(x), generator=generator)
    order = torch.randperm(len(experts), generator=generator)
    probs = normalize(logits)
    out = apply_experts(x, route(mask, probs), experts, out_shape=(2,))
    moved = apply_experts(x[tokens], route(mask[tokens], probs[tokens]), experts, out_shape=(2,))
    torch.testing.assert_close(moved, out[tokens])
    shuffled = [experts[i] for i in order]
    renamed = apply_experts(x, route(mask[:, order], probs[:, order]), shuffled, out_shape=(2,))
    torch.testing.assert_close(renamed, out)


@given(cases)
def test_without_a_tape_the_very_same_numbers(case: tuple[int, int, int, int]) -> None:
    x, logits, mask, experts = make(case)
    routing = route(mask, normalize(logits))
    taped = apply_experts(x, routing, experts, out_shape=(2,))
    calls = [list(expert.calls) for expert in experts]
    with torch.no_grad():
        assert torch.equal(apply_experts(x, routing, experts, out_shape=(2,)), taped)
    assert [expert.calls for expert in experts] == [2 * call for call in calls]


def test_gradcheck_through_hard_experts() -> None:
    x, logits, mask, experts = make((5, 4, 2, 0))
    weights = [expert.weight for expert in experts]

    def run(x: Tensor, logits: Tensor, *weights: Tensor) -> Tensor:
        blocks = [lambda rows, w=w: (rows @ w.t()).sin() for w in weights]
        return apply_experts(x, route(mask, normalize(logits)), blocks)

    assert torch.autograd.gradcheck(run, (x, logits, *weights))


def test_whole_tiles_can_be_tokens() -> None:
    x = torch.randn(4, 3, 6, 5)
    experts = [nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)]
    mask = torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1]], dtype=torch.bool)
    out = apply_experts(x, route(mask, mask.float()), experts)
    assert out.shape == (4, 2, 4, 3) and (out[2] == 0).all()
    torch.testing.assert_close(out[3], experts[0](x[3:])[0] + experts[1](x[3:])[0])
    torch.testing.assert_close(out, apply_experts_soft(x, route(mask, mask.float()), experts))


def test_idle_parameters_get_zeros_only_when_asked() -> None:
    x = torch.randn(3, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False]] * 3)
    for zero_idle in (False, True):
        experts = [Counted(0), Counted(1)]
        apply_experts(x, route(mask, mask.double()), experts, zero_idle=zero_idle).sum().backward()
        assert experts[0].weight.grad is not None
        if zero_idle:
            assert experts[1].weight.grad is not None and (experts[1].weight.grad == 0).all()
            assert experts[1].calls == []
        else:
            assert experts[1].weight.grad is None


def test_dense_weights_are_mask_times_weight() -> None:
    probs = torch.rand(4, 3, requires_grad=True)
    mask = top_k(probs, 2)
    dense = dense_weights(route(mask, probs))
    assert torch.equal(dense, probs * mask)
    dense.sum().backward()
    assert probs.grad is not None and torch.equal(probs.grad, mask.float())


def all_pairs(num_tokens: int, num_experts: int) -> Routing:
    return route(torch.ones(num_tokens, num_experts, dtype=torch.bool), torch.ones(num_tokens, num_experts))


def test_bad_input_is_refused_with_its_values() -> None:
    x, routing = torch.zeros(2, 3), all_pairs(2, 2)
    wide, narrow = (lambda r: r), (lambda r: r[:, :1])
    for taped in (True, False):
        with torch.set_grad_enabled(taped):
            with pytest.raises(ValueError, match=r"expert 1 rows of \[1\], an earlier one \[3\]"):
                apply_experts(x, routing, [wide, narrow])
            with pytest.raises(ValueError, match=r"expert 1 \[2, 1\], earlier ones \[2, 3\]"):
                apply_experts_soft(x, routing, [wide, narrow])
            with pytest.raises(ValueError, match=r"expert 0 turned \[2, 3\] into torch.float32 \[1, 3\]"):
                apply_experts(x, routing, [lambda r: r[:1], wide])
            with pytest.raises(ValueError, match=r"expected torch.float32 \[2, 5\]"):
                apply_experts(x, routing, [wide, wide], out_shape=(5,))
    with pytest.raises(ValueError, match="over 2 experts, got 1"):
        apply_experts(x, routing, [wide])
    with pytest.raises(ValueError, match="1 experts and 2 rows do not fit 1 counts of 3 rows"):
        run_experts(x, [3], [wide])
    with pytest.raises(ValueError, match="'warm'"):
        Experts([], mode="warm")  # type: ignore[arg-type]


def test_without_any_pair_the_output_is_zeros() -> None:
    x = torch.randn(2, 3)
    nothing = route(torch.zeros(2, 1, dtype=torch.bool), torch.zeros(2, 1))
    assert torch.equal(apply_experts(x, nothing, [torch.square]), torch.zeros(2, 3))
    assert torch.equal(apply_experts(x, nothing, [torch.square], out_shape=()), torch.zeros(2))
