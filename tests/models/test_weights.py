"""Files that are no weights: the sentence says why, without torch's advice to trust them."""

import re
from pathlib import Path

import pytest
import torch

from bigvision.models.weights import load_weights, read_state


class Calls:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def test_code_in_a_file_is_named_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": Calls()}, path)
    with pytest.raises(ValueError) as raised:
        read_state(path)
    assert str(raised.value).startswith(f"weights {path} are neither safetensors")
    assert re.search(r": it needs .(builtins\.)?print., and only tensors are loaded$", str(raised.value))
    assert capsys.readouterr().out == ""


def test_text_is_no_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_text("hello, not a pickle")
    with pytest.raises(ValueError, match=r"weights\.pth are neither") as raised:
        read_state(path)
    assert "trust" not in str(raised.value) and "\x1b" not in str(raised.value)


def odd_contents() -> dict[str, tuple[object, str]]:
    """What files of weights have held, and what is said of it."""
    plain = torch.nn.Linear(3, 2).state_dict()
    quantised = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)
    weight = plain["weight"]
    return {
        "sparse": (plain | {"weight": weight.to_sparse()}, "weight is stored as sparse_coo"),
        "compressed": (plain | {"weight": weight.to_sparse_csr()}, "weight is stored as sparse_csr"),
        "meta": (plain | {"weight": weight.to("meta")}, "weight is a meta tensor"),
        "quantised": (plain | {"weight": quantised}, "weight is quantised"),
        "integer keys": ({0: weight, 1: plain["bias"]}, "the key 0 is int, not a name"),
        "lists": (plain | {"bias": [1.0, 2.0]}, "bias is of type list"),
        "None": (plain | {"bias": None}, "bias is of type NoneType"),
        "more": (plain | {"epoch": 3}, "epoch is of type int"),
        "nested twice": ({"model": {"net": plain}}, "net is of type (dict|OrderedDict)"),
        "empty": ({}, "missing: weight, bias"),
        "a list": ([weight], "hold list, not a state dict"),
        "a tensor": (weight, "hold Tensor, not a state dict"),
        "complex": (plain | {"weight": weight.to(torch.complex64)}, "weight is torch.complex64, the model's"),
        "integers": (plain | {"weight": weight.long()}, "weight is torch.int64, the model's torch.float32"),
        "bool": (plain | {"bias": plain["bias"] > 0}, "bias is torch.bool, the model's torch.float32"),
        "another shape": (plain | {"bias": torch.zeros(3)}, r"bias is \(3,\), the model's \(2,\)"),
        "a scalar": (plain | {"bias": torch.tensor(1.0)}, r"bias is \(\), the model's \(2,\)"),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", odd_contents())
def test_odd_contents_are_refused_in_one_sentence_with_the_key(tmp_path: Path, kind: str) -> None:
    contents, told = odd_contents()[kind]
    path = tmp_path / "weights.pth"
    torch.save(contents, path)
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=told) as raised:
        load_weights(model, path)
    assert str(path) in str(raised.value) and len(str(raised.value).splitlines()) == 1
    assert "weights_only" not in str(raised.value) and torch.equal(model.weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nest", ["", "state_dict", "model_state_dict", "model"])
def test_other_precisions_and_usual_nests_load(tmp_path: Path, dtype: torch.dtype, nest: str) -> None:
    state = {name: value.to(dtype) for name, value in torch.nn.Linear(3, 2).state_dict().items()}
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "weights.pth")
    model = torch.nn.Linear(3, 2)
    load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model.weight, state["weight"].float())


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_called_one(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 2)), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="it is a TorchScript program") as raised:
        read_state(tmp_path / "weights.pt")
    assert "weights_only" not in str(raised.value)
