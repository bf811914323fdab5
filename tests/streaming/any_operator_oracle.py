"""A network around any operator, streamed: equal to the whole image or refused by name, within seconds.

A campaign from the command line: `python tests/streaming/any_operator_oracle.py FIRST COUNT [OPERATOR ...]`
draws COUNT networks from seed FIRST on and prints what became of them.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from any_operator import AnyNetwork, usable
from operator_table import OPERATORS
from torch import Tensor

from bigvision.graph import UnsupportedOperatorError, UntraceableError, trace
from bigvision.streaming import StreamedModel
from bigvision.streaming.backward import Budget
from bigvision.streaming.losses import SquaredError
from bigvision.streaming.tape import NonFiniteError

EXACT = 1e-9
SECONDS = 20  # of processor time for everything about one draw
NAMED = re.compile(r"^\w+ at (first|before|operator|after)\b")


@dataclass(frozen=True)
class Outcome:
    """What became of a draw.

    Attributes:
        forward: "equal", "refused", or why there is nothing to compare.
        gradient: likewise; "" where the forward settled it.
        message: of the refusal.
    """

    forward: str
    gradient: str = ""
    message: str = ""


def outcome(seed: int, name: str | None = None) -> Outcome:
    """Draw a network and hold its stream, forward and backward, against the whole image.

    Raises:
        AssertionError: it is not equal, or refused without naming the operator and its module.
        TimeoutError: it takes longer than some seconds.
        Exception: whatever else leaves the stream is a fault, too.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of what a network makes of whole numbers, too
    try:
        return _outcome(AnyNetwork(seed, name), seed)
    finally:
        torch.set_default_dtype(usual)


def _outcome(model: AnyNetwork, seed: int) -> Outcome:
    torch.manual_seed(seed)
    image = torch.randn(model.shape)
    with torch.no_grad():
        try:
            whole = model(image[None])
        except Exception:  # not every operator takes every value
            return Outcome("no network")
        if not usable(whole):
            return Outcome("no network")
        again = model(image[None])
    with limited(), at_own_size():
        try:
            streamed = StreamedModel(model, model.shape, rows=model.rows, dtype=torch.float64)
            found = streamed(image)
        except (UnsupportedOperatorError, UntraceableError, ValueError) as error:
            return Outcome("refused", message=_named(error))
        assert not differs(whole, again), "random numbers were accepted"
        if streamed.program.traced.shape != model.shape:
            return Outcome("padded")
        if differs(found, whole):
            assert not _settled(model, image, whole), f"not the whole image's: {_difference(found, whole)}"
            return Outcome("unsettled")
        return _gradient(model, streamed, image, whole)


def _gradient(model: AnyNetwork, streamed: StreamedModel, image: Tensor, whole: Tensor) -> Outcome:
    loss, target = SquaredError(), torch.randn(whole.shape[1:])
    parameters = dict(model.named_parameters())
    expected: dict[str, Tensor | None] = {}
    value, undefined = torch.tensor(torch.nan), ""
    with torch.enable_grad():
        try:
            value = loss(model(image[None]), target[None])
            taken = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            expected = dict(zip(parameters, taken, strict=True))
        except (RuntimeError, ValueError) as error:  # no derivative, or nothing to differentiate
            undefined = str(error)
    try:
        streamed.backward(image, target, loss, budget=Budget(rows=model.rows))
    except NonFiniteError:
        finite = [bool(one.isfinite().all()) for one in (value, *expected.values()) if one is not None]
        assert not all(finite), "finite gradients are refused as not finite"
        return Outcome("equal", "not finite")
    except (UnsupportedOperatorError, ValueError) as error:
        if whole.ndim == 4 and len(whole) == 1 and whole.shape[-2:] == image.shape[-2:]:
            return Outcome("equal", "refused", _named(error))
        return Outcome("equal", "no loss", _named(error))
    # Where all gradients cancel, what is left is rounding.
    scale = max([float(one.norm()) for one in expected.values() if one is not None], default=0.0)
    scale = max(scale, 1e-4 * abs(float(value.detach())), 1e-30)
    for name, parameter in parameters.items():
        reference = expected.get(name)
        if parameter.grad is None or reference is None:
            left = parameter.grad if reference is None else reference
            assert left is None or not left.any(), f"{name}: {parameter.grad} for {reference}; {undefined}"
        elif float((parameter.grad - reference).norm()) > EXACT * scale * 10:
            if not _settled(model, image, whole):
                return Outcome("equal", "unsettled")
            raise AssertionError(f"gradient of {name}: {_difference(parameter.grad, reference)}")
    return Outcome("equal", "undefined" if undefined else "equal")


def differs(found: Tensor, expected: Tensor) -> bool:
    """Whether shapes, types or numbers differ, by more than rounding; NaN and infinity must agree."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return True
    finite = expected[expected.isfinite()]
    scale = max(float(finite.abs().max()) if finite.numel() else 0.0, 1e-6)
    tolerance = 1e-5 if expected.dtype == torch.float32 else EXACT
    return not torch.allclose(found.double(), expected.double(), 0, tolerance * scale, equal_nan=True)


def _settled(model: AnyNetwork, image: Tensor, whole: Tensor) -> bool:
    """Whether rounding of the image leaves the result as it is: no tie, no jump, no cancellation."""
    with torch.no_grad():
        trials = (image * (1 + 1e-14 * torch.randn_like(image)) for _ in range(6))
        return not any(differs(model(trial[None]), whole) for trial in trials)


def _difference(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} {tuple(found.shape)} for {expected.dtype} {tuple(expected.shape)}"
    return (
        f"{float((found.double() - expected.double()).abs().max()):.3g} of {float(expected.abs().max()):.3g}"
    )


def _named(error: Exception) -> str:
    """The message, which names an operator and its module, or says that the network can't be traced."""
    message = str(error)
    named = isinstance(error, UntraceableError) or NAMED.match(message) or "network's output" in message
    assert named and "\n" not in message, f"{type(error).__name__} names no operator: {message}"
    return message


def at_own_size() -> Any:
    """While it lasts, no network is padded to its stride."""
    return mock.patch("bigvision.streaming.model.trace_padded", lambda *asked: (trace(*asked), 1))


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """A TimeoutError once this took so many seconds of processor time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def campaign(first: int, count: int, names: list[str]) -> int:
    """Draw and print; the number of faults."""
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    faults: list[tuple[int, str]] = []
    for seed in range(first, first + count):
        name = names[seed % len(names)] if names else None
        try:
            done = outcome(seed, name)
            counts[f"{done.forward} {done.gradient}".strip()] += 1
            if done.message:
                refused[re.sub(r"\d+", "0", done.message)[:90]] += 1
        except (Exception, TimeoutError) as error:
            model = AnyNetwork(seed, name)
            faults.append((seed, model.name))
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
            print(
                f"{model.extra_repr()}: {text[:300]} ({where.filename.split('/')[-1]}:{where.lineno})",
                flush=True,
            )
    print(f"{count} draws from {first}: {dict(counts.most_common())}, {len(faults)} faults")
    for message, times in refused.most_common(60):
        print(f"  {times:5d} {message}")
    return len(faults)


if __name__ == "__main__":
    chosen = [name for name in OPERATORS if any(wanted in name for wanted in sys.argv[3:])]
    sys.exit(campaign(int(sys.argv[1]), int(sys.argv[2]), chosen) > 0)
