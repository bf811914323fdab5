"""The network stays its user's: a stream leaves it as it is, follows what changes, and says when it can't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from bigvision.streaming import StreamedModel
from bigvision.streaming.batch_norm import scene_statistics, update_running_statistics
from bigvision.streaming.following import StaleError
from bigvision.streaming.losses import CrossEntropy

SHAPE = (3, 20, 16)


class Net(nn.Module):
    """A folded batch norm, dropout, a plain tensor, a number, and attributes that its forward sets."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Conv2d(4, 3, 3, padding=1)
        self.constant, self.factor, self.calls = torch.full((3, 1, 1), 2.0, dtype=torch.float64), 3, 0
        self.features: list[Tensor] = []
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.drop(self.norm(self.conv(x)).relu())
        self.features.append(self.last)
        return self.head(self.last) * self.constant * self.factor


def assert_follows(streamed: StreamedModel, model: nn.Module) -> None:
    """Output and gradients are those of the whole image in eval mode."""
    image, truth = torch.randn(SHAPE, dtype=torch.float64), torch.randint(0, 3, SHAPE[1:])
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    modes = [(module, module.training) for module in model.modules()]
    expected = model.eval()(image[None])
    CrossEntropy()(expected, truth[None]).backward()
    whole = [p.grad for p in parameters]
    for module, training in modes:
        module.training = training
    torch.testing.assert_close(streamed(image), expected.detach())
    model.zero_grad()
    streamed.backward(image, truth, CrossEntropy())
    torch.testing.assert_close([p.grad for p in parameters], whole)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_network_is_left_as_it_was() -> None:
    model = Net().train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    wanted = [p.requires_grad for p in model.parameters()]
    streamed = StreamedModel(model, SHAPE, dtype=torch.float64)
    streamed(torch.randn(SHAPE, dtype=torch.float64))
    streamed.backward(torch.randn(SHAPE, dtype=torch.float64), torch.zeros(SHAPE[1:]).long(), CrossEntropy())
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items()), name
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert model.training and model.drop.training and not model.norm.training
    assert not model.features and not hasattr(model, "last")


def test_a_network_that_fails_is_left_as_it_was() -> None:
    model = Net().train().requires_grad_(False)
    model.head = nn.Conv2d(5, 3, 3)
    with pytest.raises(ValueError, match="does not run"):
        StreamedModel(model, SHAPE)
    assert model.training and model.drop.training and not model.features and not model.calls
    assert model.head.weight.requires_grad and not model.conv.weight.requires_grad


def load(model: Net) -> None:
    model.load_state_dict(Net(1).state_dict())


def assign(model: Net) -> None:
    model.load_state_dict(Net(1).state_dict(), assign=True)


def replace_parameter(model: Net) -> None:
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 2)


def replace_buffer(model: Net) -> None:
    model.norm.running_mean = torch.randn(4, dtype=torch.float64)
    model.norm.running_var = torch.rand(4, dtype=torch.float64) + 1


def change_buffers(model: Net) -> None:
    model.norm.running_mean.add_(1)  # type: ignore[union-attr]
    model.norm.running_var.mul_(3)  # type: ignore[union-attr]


def change_constant(model: Net) -> None:
    model.constant.mul_(2)


def replace_constant(model: Net) -> None:
    model.constant = torch.full((3, 1, 1), 5.0, dtype=torch.float64)


def freeze(model: Net) -> None:
    model.conv.requires_grad_(False)


def step(model: Net) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1


def run_it(model: Net) -> None:
    model.train()(torch.randn(1, *SHAPE, dtype=torch.float64))
    model.calls += 3


def to_and_fro(model: Net) -> None:
    model.float().double()


FOLLOWED = [
    load, assign, replace_parameter, replace_buffer, change_buffers, change_constant, replace_constant,
    freeze, step, run_it, to_and_fro,
]  # fmt: skip


@pytest.mark.parametrize("change", FOLLOWED)
def test_changes_are_followed(change: Callable[[Net], None]) -> None:
    model = Net()
    streamed = StreamedModel(model, SHAPE, dtype=torch.float64)
    assert_follows(streamed, model)
    change(model)
    assert_follows(streamed, model)


def narrow(model: Net) -> None:
    model.float()


def add_bias(model: Net) -> None:
    model.head = nn.Conv2d(4, 3, 3, padding=1).double()


def change_stride(model: Net) -> None:
    model.conv.dilation = (2, 2)


def change_number(model: Net) -> None:
    model.factor = 4


def parametrise(model: Net) -> None:
    parametrizations.weight_norm(model.conv)


def parametrise_by_hooks(model: Net) -> None:
    weight_norm(model.conv)


def hook(model: Net) -> None:
    model.conv.register_forward_hook(lambda module, inputs, y: y * 2)


def reshape(model: Net) -> None:
    model.head.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def drop_bias(model: Net) -> None:
    model.conv.bias = None


def new_forward(model: Net) -> None:
    model.conv.forward = lambda x: x  # type: ignore[method-assign, assignment]


STALE = {
    narrow: r"conv\.weight was torch\.float64.*and is torch\.float32",
    add_bias: r"module head is another one",
    change_stride: r"conv\.dilation was \(1, 1\) and is \(2, 2\)",
    change_number: r"factor was 3 and is 4",
    parametrise: r"module 'conv\.parametrizations' is new|conv is another one",
    parametrise_by_hooks: r"conv\.(_forward_pre_hooks|weight)",
    hook: r"conv\._forward_hooks",
    reshape: r"head\.bias was torch\.float64 \(3,\) and is torch\.float64 \(1,\)",
    drop_bias: r"conv\.bias is gone",
    new_forward: r"conv\.forward",
}


@pytest.mark.parametrize("change", STALE)
def test_a_stream_that_can_t_follow_says_what_changed(change: Callable[[Net], None]) -> None:
    model = Net()
    streamed = StreamedModel(model, SHAPE, dtype=torch.float64)
    change(model)
    image = torch.randn(SHAPE, dtype=torch.float64)
    with pytest.raises(StaleError, match=STALE[change] + r".*Make a new StreamedModel"):
        streamed(image)
    with pytest.raises(StaleError, match=STALE[change]):
        streamed.backward(image, torch.zeros(SHAPE[1:]).long(), CrossEntropy())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "normalise",
    [
        lambda conv: parametrizations.weight_norm(conv),
        lambda conv: parametrizations.spectral_norm(conv),
        lambda conv: parametrizations.orthogonal(conv),
        weight_norm,
        spectral_norm,
    ],
    ids=range(5),
)
def test_weights_that_are_computed_of_others_train_them(normalise: Callable[[nn.Module], object]) -> None:
    model = Net().eval()
    normalise(model.conv)
    model.double()
    streamed = StreamedModel(model, SHAPE, dtype=torch.float64)
    assert_follows(streamed, model)
    step(model)
    assert_follows(streamed, model)


def test_the_scene_s_statistics_by_the_public_way() -> None:
    streamed, whole = Net().train(), Net().train()
    for one in (streamed, whole):
        one.drop.eval()
    image, truth = torch.randn(SHAPE, dtype=torch.float64), torch.randint(0, 3, SHAPE[1:])
    expected = whole(image[None])
    CrossEntropy()(expected, truth[None]).backward()
    with scene_statistics(streamed):
        stream = StreamedModel(streamed, SHAPE, dtype=torch.float64, rows=5)
        torch.testing.assert_close(stream(image), expected.detach())
        result = stream.backward(image, truth, CrossEntropy())
    assert [one.module for one in result.moments] == ["norm"]
    update_running_statistics(streamed, result.moments)
    for (name, one), two in zip(streamed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)
    for (name, left), right in zip(streamed.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(left, right, msg=name)
    again = stream.backward(image, truth, CrossEntropy())  # the stream keeps the mode that it was made in
    assert len(again.moments) == 1


def test_the_network_s_own_eval_is_not_called() -> None:
    class Merging(Net):
        def train(self, mode: bool = True) -> Merging:
            if not mode:
                raise AssertionError("merges its weights for good")
            super().train(mode)
            return self

    StreamedModel(Merging(), SHAPE)


def test_weights_made_in_inference_mode_stream_forward() -> None:
    with torch.inference_mode():
        model = Net().eval()
    image = torch.randn(SHAPE, dtype=torch.float64)
    with torch.inference_mode():
        whole = model(image[None])
    torch.testing.assert_close(StreamedModel(model, SHAPE, dtype=torch.float64)(image), whole.clone())


def test_weights_without_values_are_planned_and_not_streamed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU())
    streamed = StreamedModel(model, SHAPE)
    assert streamed.plan.flops > 0
    with pytest.raises(ValueError, match=r"0\.weight has no values"):
        streamed(torch.randn(SHAPE))
