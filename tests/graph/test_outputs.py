"""Which output of a network counts: the only tensor, `out` or `logits` of names, else the caller's."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigvision.graph import OutputError, geometry, main_output, trace
from bigvision.streaming import StreamedModel

IMAGE = torch.rand(1, 3, 12, 10, dtype=torch.float64)
Named = namedtuple("Named", "aux logits")


@dataclass
class Output:
    """As a Hugging Face model returns it."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """A dict and a dataclass at once, without its empty fields, as Hugging Face's own is."""

    logits: Tensor | None = None
    aux: Tensor | None = None

    def __post_init__(self) -> None:
        self.update(
            {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        )


class Returning(nn.Module):
    """`make(main, aux)` of two maps, of which the second has no row rule of its own."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.main, self.aux, self.make = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.main(x), self.aux(x).cumsum(2))


CLEAR = {
    "a tensor": lambda main, aux: main,
    "out of a dict": lambda main, aux: {"aux": aux, "out": main},
    "logits of a dict": lambda main, aux: {"aux": aux, "logits": main},
    "out of an OrderedDict": lambda main, aux: OrderedDict(aux=aux, out=main),
    "the only one of a dict": lambda main, aux: {"mask": main, "loss": None, "scale": 2},
    "a dataclass": lambda main, aux: Output(logits=main, hidden=(aux, aux)),
    "a ModelOutput": lambda main, aux: ModelOutput(logits=main, aux=aux),
    "a ModelOutput of one": lambda main, aux: ModelOutput(logits=main),
    "a named tuple": lambda main, aux: Named(aux, main),
    "a tuple of one": lambda main, aux: (main,),
    "a list of one": lambda main, aux: [main, None],
    "a nest": lambda main, aux: [{"seg": {"aux": [aux], "out": (main,)}}],
}
UNCLEAR = {
    "a tuple": (lambda main, aux: (aux, main), "1", "0, 1"),
    "a list": (lambda main, aux: [aux, main], -1, "0, 1"),
    "a dict": (lambda main, aux: {"aux": aux, "seg": main}, "seg", "aux, seg"),
    "both names": (lambda main, aux: {"out": aux, "logits": main}, "logits", "out, logits"),
    "features": (lambda main, aux: {"out": [aux, main]}, "out.1", "out.0, out.1"),
    "keys with dots": (lambda main, aux: {"a.b": main, "a": {"c": aux}}, "a.b", "a.b, a.c"),
    "a nest": (lambda main, aux: (aux, {"out": main}), "1", "0, 1.out"),
    "numbers": (lambda main, aux: {4: aux, 8: main}, 8, "4, 8"),
    "a dataclass": (lambda main, aux: Output(hidden=(aux, main)), "hidden.-1", "hidden.0, hidden.1"),
}


@pytest.mark.parametrize("make", CLEAR.values(), ids=CLEAR)
def test_one_output_counts_run_and_streamed(make: Any) -> None:
    model = Returning(make).double().eval()
    whole = main_output(model(IMAGE))
    assert torch.equal(whole, model.main(IMAGE))
    torch.testing.assert_close(StreamedModel(model, (3, 12, 10), dtype=torch.float64)(IMAGE[0]), whole)
    assert geometry(trace(model, (3, 12, 10))).halo == 1  # the other one's operators don't matter


@pytest.mark.parametrize(("make", "name", "listed"), UNCLEAR.values(), ids=UNCLEAR)
def test_of_several_the_caller_names_one(make: Any, name: str | int, listed: str) -> None:
    model = Returning(make).double().eval()
    with pytest.raises(OutputError, match=rf"2 tensors, {listed}: say which .*output='"):
        main_output(model(IMAGE))
    with pytest.raises(OutputError, match=rf"2 tensors, {listed}: say which"):
        StreamedModel(model, (3, 12, 10))
    streamed = StreamedModel(model, (3, 12, 10), dtype=torch.float64, output=name)
    torch.testing.assert_close(streamed(IMAGE[0]), model.main(IMAGE))
    assert torch.equal(main_output(model(IMAGE), name), model.main(IMAGE))


def test_the_advice_of_the_refusal_works() -> None:
    model = Returning(UNCLEAR["features"][0])
    with pytest.raises(OutputError) as refused:
        StreamedModel(model, (3, 12, 10))
    name = str(refused.value).split("output='")[1].split("'")[0]
    with pytest.raises(ValueError, match="cumsum"):  # it is the other map, which has no rule
        StreamedModel(model, (3, 12, 10), output=name)


@pytest.mark.parametrize("name", ["absent", "out.2", "out.x", 3])
def test_a_name_that_is_none_is_told(name: str | int) -> None:
    with pytest.raises(OutputError, match=rf"no output '{name}'; it returns out\.0, out\.1"):
        StreamedModel(Returning(UNCLEAR["features"][0]), (3, 12, 10), output=name)


def test_a_name_of_several_is_told() -> None:
    with pytest.raises(OutputError, match=r"output 'out' of the network holds 2 tensors, out\.0, out\.1"):
        StreamedModel(Returning(UNCLEAR["features"][0]), (3, 12, 10), output="out")


@pytest.mark.parametrize("result", [None, {}, [], {"loss": None}, "text", 3])
def test_no_tensor_is_told(result: Any) -> None:
    with pytest.raises(OutputError, match="returns no tensor but"):
        main_output(result)
