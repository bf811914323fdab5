"""What a forward does beside computing: stopped gradients are carried, the rest is refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigvision.graph import UnsupportedOperatorError, UntraceableError
from bigvision.streaming import StreamedModel
from bigvision.streaming.losses import CrossEntropy

SHAPE = (3, 20, 16)


class Round(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Net(nn.Module):
    """Two parts, a and b, that `run` combines."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.a = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("count", torch.ones(()))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def frozen_backbone(n: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        features = n.a(x)
    return n.b(features) + x


def frozen_but_for_a_part(n: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        features = n.a(x)
        with torch.enable_grad():
            features = n.b(features)
        aside = n.a(features)
    return n.b(features) + aside


def grad_mode_set(n: Net, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    features = n.a(x)
    torch.set_grad_enabled(True)
    return n.b(features)


def inference(n: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        features = n.a(x)
    return n.b(features.clone())


def detached_statistic(n: Net, x: Tensor) -> Tensor:
    y = n.b(x)
    with torch.no_grad():
        centre = y.mean((2, 3), keepdim=True)
    return y - centre


def own_changes_without_gradient(n: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        features = n.a(x)
        features.mul_(2)
    return n.b(features)


def stop_in_a_checkpoint(n: Net, x: Tensor) -> Tensor:
    return n.b(checkpoint(lambda y: frozen_backbone(n, y), x, use_reentrant=False))


def autocast_off(n: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", torch.float16):
        return n.a(n.b(x))


CARRIED = [
    frozen_backbone,
    frozen_but_for_a_part,
    grad_mode_set,
    inference,
    detached_statistic,
    own_changes_without_gradient,
    stop_in_a_checkpoint,
    autocast_off,
    lambda n, x: n.b(n.a(x).detach()) + n.b(x),
    lambda n, x: n.b(n.a(x).data) + n.b(x),
    lambda n, x: n.b(x) + (n.b(x).relu() - n.b(x)).detach(),  # a straight-through estimator by hand
    lambda n, x: n.b(checkpoint(n.a, x, use_reentrant=False)),
    lambda n, x: n.b(checkpoint(n.a, x, use_reentrant=True)),  # an image without gradient gives a none
    lambda n, x: torch.func.vmap(lambda one: 2 * one)(n.b(x)),
    lambda n, x: torch.func.functional_call(n.b, {"weight": 2 * n.b.weight, "bias": n.b.bias}, (x,)),
    lambda n, x: F.dropout(n.b(x), 0.5, training=n.training),
    lambda n, x: F.dropout(n.b(x), 0.0, training=True),
    lambda n, x: F.rrelu(n.b(x)),
]


@pytest.mark.parametrize("run", CARRIED, ids=range(len(CARRIED)))
def test_gradients_stop_where_autograd_stops_them(run: Callable[[Net, Tensor], Tensor]) -> None:
    model, whole = Net(run), Net(run)
    image, truth = torch.randn(SHAPE, dtype=torch.float64), torch.randint(0, 3, SHAPE[1:])
    streamed = StreamedModel(model, SHAPE, dtype=torch.float64, rows=5)
    expected = whole(image[None])
    torch.testing.assert_close(streamed(image), expected.detach())
    CrossEntropy()(expected, truth[None]).backward()
    streamed.backward(image, truth, CrossEntropy())
    for (name, one), two in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_frozen_parameters_that_thaw_learn_and_stopped_ones_do_not() -> None:
    model = Net(frozen_backbone).requires_grad_(False)
    streamed = StreamedModel(model, SHAPE, dtype=torch.float64)
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    streamed.backward(torch.randn(SHAPE, dtype=torch.float64), torch.zeros(SHAPE[1:]).long(), CrossEntropy())
    assert model.b.weight.grad is not None
    assert all(p.grad is None for p in model.a.parameters())


def test_a_frozen_backbone_stays_folded() -> None:
    program = StreamedModel(Net(frozen_backbone), SHAPE, dtype=torch.float64).program
    names = [node.name for node in program.stages]
    assert sum("batch_norm" in name for name in names) == 0 and sum("detach" in name for name in names) == 1


@pytest.mark.parametrize("change", [lambda g: 2 * g, lambda g: None])
def test_hooks_of_parameters_are_called_once_with_the_whole_gradient(change: Callable[..., object]) -> None:
    model, whole, seen = Net(lambda n, x: n.b(n.b(x))), Net(lambda n, x: n.b(n.b(x))), []
    image, truth = torch.randn(SHAPE, dtype=torch.float64), torch.randint(0, 3, SHAPE[1:])
    for one in (model, whole):
        one.b.weight.register_hook(lambda g: (seen.append(g.clone()), change(g))[1])
        one.b.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    CrossEntropy()(whole(image[None]), truth[None]).backward()
    StreamedModel(model, SHAPE, dtype=torch.float64).backward(image, truth, CrossEntropy())
    assert len(seen) == 4
    torch.testing.assert_close(seen[2:], seen[:2])


def reverse(n: Net, x: Tensor) -> Tensor:
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.view_as(y)

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return -gradient

    return n.b(Reverse.apply(n.a(x)))


def hooked(n: Net, x: Tensor) -> Tensor:
    y = n.b(x)
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)
    return n.a(y)


def retained(n: Net, x: Tensor) -> Tensor:
    y = n.b(x)
    if y.requires_grad:
        y.retain_grad()
    return n.a(y)


def changed_behind_autograd(n: Net, x: Tensor) -> Tensor:
    y = n.b(x)
    with torch.no_grad():
        y.mul_(2)
    return y


def changed_by_data(n: Net, x: Tensor) -> Tensor:
    y = n.b(x)
    y.data.mul_(2)
    return y


UNGRADABLE = {
    "Round": lambda n, x: Round.apply(n.b(x) * 3),
    "Reverse": reverse,
    "register_hook": hooked,
    "retain_grad": retained,
    "mul_ at the top level": changed_behind_autograd,
    "mul_ at the top leve": changed_by_data,
    "use_reentrant=False": lambda n, x: n.b(checkpoint(n.b, n.b(x), use_reentrant=True)),
}


@pytest.mark.parametrize("name", UNGRADABLE)
def test_other_gradients_are_refused_by_name_and_results_are_not(name: str) -> None:
    model = Net(UNGRADABLE[name])
    image = torch.randn(SHAPE, dtype=torch.float64)
    streamed = StreamedModel(model, SHAPE, dtype=torch.float64, rows=5)
    torch.testing.assert_close(streamed(image), model(image[None]).detach())
    assert streamed.plan.training is None
    with pytest.raises(UnsupportedOperatorError, match=rf"gradient can't be streamed, only.*{name}"):
        streamed.backward(image, torch.zeros(SHAPE[1:]).long(), CrossEntropy())


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules_are_refused(kind: str) -> None:
    model = Net(lambda n, x: n.b(n.a(x)))
    getattr(model.a, kind)(lambda *gradients: None)
    with pytest.raises(UnsupportedOperatorError, match="the backward hook of a"):
        StreamedModel(model, SHAPE, dtype=torch.float64).backward(
            torch.randn(SHAPE, dtype=torch.float64), torch.zeros(SHAPE[1:]).long(), CrossEntropy()
        )


def normal(n: Net, x: Tensor) -> Tensor:
    return n.b(x) + torch.empty(1, 3, 1, 1, dtype=x.dtype).normal_()


RANDOM: list[Callable[[Net, Tensor], Tensor]] = [
    lambda n, x: F.dropout(n.b(x), 0.5, training=True),
    lambda n, x: n.b(x) * F.dropout(n.b.bias, 0.5, training=True).view(1, -1, 1, 1),
    lambda n, x: F.rrelu(n.b(x), training=True),
    lambda n, x: F.alpha_dropout(n.b(x), 0.5, training=True),
    lambda n, x: F.dropout2d(n.b(x), 0.5, training=True),
    lambda n, x: F.feature_alpha_dropout(n.b(x), 0.5, training=True),
    lambda n, x: n.b(x) + torch.rand_like(x),
    lambda n, x: n.b(x) * torch.bernoulli(torch.full_like(x, 0.5)),
    lambda n, x: n.b(x) + torch.randn(1, 3, 1, 1, dtype=x.dtype),
    lambda n, x: n.b(x) + torch.multinomial(torch.ones(3), 1).to(x.dtype),
    lambda n, x: n.b(x)[:, torch.randperm(3)],
    lambda n, x: F.gumbel_softmax(n.b(x), dim=1),
    normal,
    lambda n, x: n.b(x) * random.random(),
    lambda n, x: n.b(x) * float(np.random.rand()),  # noqa: NPY002
]


@pytest.mark.parametrize("run", RANDOM, ids=range(len(RANDOM)))
def test_what_is_drawn_anew_in_each_pass_is_refused(run: Callable[[Net, Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedOperatorError, match="draws random numbers"):
        StreamedModel(Net(run), SHAPE, dtype=torch.float64)


def counting(n: Net, x: Tensor) -> Tensor:
    n.count += 1
    return n.b(x) * n.count


def clamping(n: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        n.b.weight.clamp_(-1, 1)
    return n.b(x)


def replacing(n: Net, x: Tensor) -> Tensor:
    n.b.weight.data = n.b.weight.data.clamp(-1, 1)
    return n.b(x)


def autocast(n: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return n.b(x).to(x.dtype)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (counting, "each call changes count"),
        (clamping, r"each call changes b\.weight"),
        (replacing, r"sets the \.data of a tensor at the top level"),
        (autocast, r"computes under torch\.autocast at b"),
    ],
)
def test_what_a_graph_can_t_repeat_is_refused(run: Callable[[Net, Tensor], Tensor], why: str) -> None:
    model = Net(run)
    before = deepcopy(model.state_dict())
    with pytest.raises((UnsupportedOperatorError, UntraceableError), match=why):
        StreamedModel(model, SHAPE, dtype=torch.float64)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_caller_s_modes_do_not_matter() -> None:
    run = CARRIED[0]
    model, whole = Net(run), Net(run)
    image, truth = torch.randn(SHAPE, dtype=torch.float64), torch.randint(0, 3, SHAPE[1:])
    CrossEntropy()(whole(image[None]), truth[None]).backward()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        streamed = StreamedModel(model, SHAPE, dtype=torch.float64)
        y = streamed(image)
        streamed.backward(image, truth, CrossEntropy())
    torch.testing.assert_close(y.clone(), whole(image[None]).detach())
    torch.testing.assert_close(model.b.weight.grad, whole.b.weight.grad)


@torch.library.custom_op("bigvision_test::mean", mutates_args=())
def custom_mean(x: Tensor, dims: list[int]) -> Tensor:
    """An operator of the user's own, with the name of one of torch's."""
    return x.mean(dims, keepdim=True) * 2


custom_mean.register_fake(lambda x, dims: x.mean(dims, keepdim=True))


def test_an_operator_of_another_library_is_not_torch_s_of_the_same_name() -> None:
    with pytest.raises(UnsupportedOperatorError, match="bigvision_test::mean at the top level"):
        StreamedModel(Net(lambda n, x: n.b(x) + custom_mean(n.b(x), [2, 3])), SHAPE)
