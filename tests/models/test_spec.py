"""Models by name and weights by file: what is built, and how each misfit is told."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigvision.models.spec import ModelSpec, load_model, parse_spec

FACTORY = """
from torch import nn

def factory(width=4, bias=True, name=None):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width))

def raises():
    raise RuntimeError("first line\\nsecond line")

def number():
    return 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(FACTORY)
    return path


def test_arguments_are_python_literals_or_strings() -> None:
    spec = parse_spec("segmentation_models_pytorch:Unet?encoder_name=resnet18&in_channels=4&encoder_weights=")
    assert spec == ModelSpec(
        "segmentation_models_pytorch",
        "Unet",
        (("encoder_name", "resnet18"), ("in_channels", 4), ("encoder_weights", None)),
    )
    values = dict(parse_spec("m:f?a=1.5&b=true&c=False&d=(1,2)&e=none&f=a%26b").arguments)
    assert values == {"a": 1.5, "b": True, "c": False, "d": (1, 2), "e": None, "f": "a&b"}


def test_the_output_that_counts_stands_behind_a_hash() -> None:
    assert parse_spec("m:f?a=1#logits") == ModelSpec("m", "f", (("a", 1),), "logits")
    assert parse_spec("m:f#-1") == ModelSpec("m", "f", output="-1")
    assert parse_spec("dir#2/x.pt2#decoder.0") == ModelSpec("dir#2/x.pt2", "", output="decoder.0")
    for text in ("dir#2/nets.py:f", "net#2.pt2", "m:f?a=#f00/"):
        assert parse_spec(text).output is None


@pytest.mark.parametrize("text", ["", "resnet18", ":f", "m:", "m:f g", "m:f?a", "x.pt2?a=1"])
def test_what_is_no_model_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="model"):
        parse_spec(text)


def test_a_factory_in_a_file(file: Path) -> None:
    model = load_model(f"{file}:factory?width=7&bias=false")
    assert isinstance(model, nn.Sequential) and not model.training
    assert model[0].weight.shape == (7, 3, 3, 3) and model[0].bias is None


def test_an_untrained_model_is_the_same_each_time(file: Path) -> None:
    before = torch.get_rng_state()
    one, other = (load_model(f"{file}:factory").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(before, torch.get_rng_state())


def test_torchvision_fetches_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    model = load_model("torchvision:lraspp_mobilenet_v3_large?num_classes=2")
    assert sum(p.numel() for p in model.parameters()) > 1e6


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("raises", "raises raised RuntimeError: first line$"),
        ("number", "returned int, not a torch.nn.Module"),
        ("absent", "has no callable 'absent'"),
        ("factory?depth=3", "unexpected keyword argument 'depth'"),
    ],
)
def test_a_factory_that_fails_is_one_sentence(file: Path, factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(f"{file}:{factory}")


def test_modules_and_names_that_are_not_there(tmp_path: Path) -> None:
    for text, message in (
        ("no_such_package:f", "'no_such_package' does not import"),
        ("torchvision:no_such_net", "torchvision has no model 'no_such_net'"),
        (f"{tmp_path}/absent.py:f", "absent.py does not exist"),
        (f"{tmp_path}/absent.pt2", "absent.pt2 does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(text)


class TestPrograms:
    @pytest.fixture
    def program(self, tmp_path: Path) -> Path:
        height, width = (torch.export.Dim(name, min=2, max=4096) for name in ("height", "width"))
        net = nn.Conv2d(3, 2, 3, padding=1).eval()
        exported = torch.export.export(
            net, (torch.zeros(1, 3, 32, 48),), dynamic_shapes=({2: height, 3: width},)
        )
        torch.export.save(exported, tmp_path / "net.pt2")
        return tmp_path / "net.pt2"

    def test_need_trust(self, program: Path) -> None:
        with pytest.raises(ValueError, match="--trust-model"):
            load_model(str(program))

    def test_run_at_any_size(self, program: Path) -> None:
        model = load_model(str(program), trust=True)
        assert model(torch.zeros(1, 3, 20, 77)).shape == (1, 2, 20, 77)

    def test_damaged(self, program: Path) -> None:
        program.write_bytes(b"nothing")
        with pytest.raises(ValueError, match=r"net\.pt2 is not a program"):
            load_model(str(program), trust=True)


class TestWeights:
    @pytest.fixture
    def state(self, file: Path) -> dict[str, torch.Tensor]:
        model = load_model(f"{file}:factory")
        return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}

    def test_safetensors_and_state_dicts(
        self, file: Path, tmp_path: Path, state: dict[str, torch.Tensor]
    ) -> None:
        save_file(state, tmp_path / "a.safetensors")
        torch.save(state, tmp_path / "b.pth")
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "c.pth"
        )
        for name in ("a.safetensors", "b.pth", "c.pth"):
            loaded = load_model(f"{file}:factory", tmp_path / name).state_dict()
            assert all(torch.equal(loaded[key], value) for key, value in state.items())

    def test_misfits(self, file: Path, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(
            ValueError, match=r"of another shape: 0\.weight is \(4, 3, 3, 3\), the model's \(5"
        ):
            load_model(f"{file}:factory?width=5", tmp_path / "w.safetensors")
        save_file({"other": torch.zeros(1)}, tmp_path / "w.safetensors")
        with pytest.raises(
            ValueError, match=r"missing: 0\.weight, 0\.bias, 1\.weight and 4 more; unknown: other"
        ):
            load_model(f"{file}:factory", tmp_path / "w.safetensors")

    def test_nothing_is_unpickled_freely(self, file: Path, tmp_path: Path) -> None:
        marker = tmp_path / "executed"

        class Attack:
            def __reduce__(self) -> tuple[object, tuple[Path]]:
                return Path.touch, (marker,)

        (tmp_path / "w.pth").write_bytes(pickle.dumps({"0.weight": Attack()}))
        torch.save({"0.weight": Attack()}, tmp_path / "v.pth")
        for name in ("w.pth", "v.pth"):
            with pytest.raises(ValueError, match="neither safetensors nor a state dict"):
                load_model(f"{file}:factory", tmp_path / name)
        assert not marker.exists()

    @pytest.mark.parametrize("name", ["absent.pth", "empty.safetensors", "list.pth"])
    def test_files_that_are_none(self, file: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "empty.safetensors").touch()
        torch.save([torch.zeros(1)], tmp_path / "list.pth")
        with pytest.raises(ValueError, match=name):
            load_model(f"{file}:factory", tmp_path / name)
