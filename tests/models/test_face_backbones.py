"""Face backbones: the public networks' parameter names, shapes and sizes; files that say what they are."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bigvision.models.embedding import (
    FACE_BACKBONES,
    BackboneSpec,
    EmbeddingNet,
    build_backbone,
    load_backbone,
    read_backbone_spec,
    save_backbone,
)
from bigvision.models.iresnet import iresnet18
from bigvision.models.mobilefacenet import mobilefacenet


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{part}": (width,) for part in ("weight", "bias")}
    return shapes | {
        f"{name}.running_mean": (width,),
        f"{name}.running_var": (width,),
        f"{name}.num_batches_tracked": (),
    }


def public_iresnet(depths: tuple[int, ...], dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the public state dicts, written out from their description."""
    shapes = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,)} | norm("bn1", 64)
    before = 64
    for stage, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), start=1):
        for unit in range(depth):
            name = f"layer{stage}.{unit}"
            shapes |= norm(f"{name}.bn1", before) | norm(f"{name}.bn2", width) | norm(f"{name}.bn3", width)
            shapes |= {
                f"{name}.conv1.weight": (width, before, 3, 3),
                f"{name}.conv2.weight": (width, width, 3, 3),
            }
            shapes |= {f"{name}.prelu.weight": (width,)}
            if unit == 0:
                shapes |= {f"{name}.downsample.0.weight": (width, before, 1, 1)} | norm(
                    f"{name}.downsample.1", width
                )
            before = width
    shapes |= norm("bn2", 512) | norm("features", dim)
    return shapes | {"fc.weight": (dim, 512 * 49), "fc.bias": (dim,)}


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("iresnet18", (2, 2, 2, 2)),
        ("iresnet34", (3, 4, 6, 3)),
        ("iresnet50", (3, 4, 14, 3)),
        ("iresnet100", (3, 13, 30, 3)),
    ],
)
def test_iresnet_has_the_public_names(name: str, depths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneSpec(name))
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == public_iresnet(
        depths, 512
    )


def test_mobilefacenet_has_the_public_names() -> None:
    state = mobilefacenet().state_dict()
    expected = {
        "layers.0.layers.0.weight": (128, 3, 3, 3),
        "layers.0.layers.2.weight": (128,),
        "layers.1.layers.0.weight": (128, 2, 3, 3),
        "layers.2.layers.0.layers.0.weight": (128, 128, 1, 1),
        "layers.2.layers.1.layers.0.weight": (128, 1, 3, 3),
        "layers.2.layers.2.layers.1.running_var": (128,),
        "layers.3.layers.3.layers.2.layers.0.weight": (128, 128, 1, 1),
        "layers.4.layers.2.layers.0.weight": (256, 256, 1, 1),
        "layers.5.layers.5.layers.0.layers.0.weight": (256, 256, 1, 1),
        "layers.6.layers.0.layers.0.weight": (512, 256, 1, 1),
        "layers.7.layers.1.layers.2.layers.1.bias": (256,),
        "conv_sep.layers.0.weight": (512, 256, 1, 1),
        "features.layers.0.layers.0.weight": (512, 1, 7, 7),
        "features.layers.2.weight": (512, 512),
        "features.layers.3.running_mean": (512,),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected
    assert "layers.8.layers.0.weight" not in state
    assert {key.split(".")[0] for key in state} == {"layers", "conv_sep", "features"}


def test_the_public_sizes() -> None:
    # Published: iresnet50 43.6 M, iresnet100 65.2 M, mbf 2.05 M parameters.
    sizes = {}
    for name in FACE_BACKBONES:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in build_backbone(BackboneSpec(name)).parameters()) / 1e6
    assert sizes["iresnet18"] == pytest.approx(24.0, abs=0.1)
    assert sizes["iresnet50"] == pytest.approx(43.6, abs=0.1)
    assert sizes["iresnet100"] == pytest.approx(65.2, abs=0.1)
    assert sizes["mobilefacenet"] == pytest.approx(2.05, abs=0.02)


@pytest.mark.parametrize(
    "name", ["iresnet18", "mobilefacenet", "torchvision:resnet18", "torchvision:mobilenet_v3_small"]
)
def test_embeddings_of_any_width_and_their_gradients(name: str) -> None:
    model = build_backbone(BackboneSpec(name, 24, 48))
    out = model(torch.randn(3, 3, 48, 48))
    assert out.shape == (3, 24)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_embeddings_are_normalised_with_a_fixed_gain() -> None:
    for name in ("iresnet18", "torchvision:resnet18"):
        features = build_backbone(BackboneSpec(name, 8, 32)).features
        assert isinstance(features, nn.BatchNorm1d)
        assert not features.weight.requires_grad
        assert features.weight.eq(1).all()


def test_what_cannot_be_built_is_refused() -> None:
    for spec, message in (
        (BackboneSpec("iresnet19"), "'iresnet19' is none of iresnet18"),
        (BackboneSpec("iresnet18", image_size=100), "multiple of 16, not 100"),
        (BackboneSpec("mobilefacenet", image_size=8), "multiple of 16, not 8"),
        (BackboneSpec("iresnet18", dim=0), "embedding of 0"),
        (BackboneSpec("torchvision:resnet19"), "no classifier 'resnet19'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_backbone(spec)
    with pytest.raises(ValueError, match="no linear layer"):
        EmbeddingNet(nn.Conv2d(3, 3, 1), 8)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    spec = BackboneSpec("iresnet18", 16, 32)
    model = build_backbone(spec).eval()
    save_backbone(model, spec, path)
    loaded, found = load_backbone(path)
    assert found == read_backbone_spec(path) == spec
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert [entry.name for entry in tmp_path.iterdir()] == ["backbone.safetensors"]


def test_foreign_weights_need_a_name_and_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"
    torch.save({f"module.{key}": value for key, value in iresnet18(16, 32).state_dict().items()}, path)
    with pytest.raises(ValueError, match="don't say which backbone"):
        load_backbone(path)
    assert load_backbone(path, BackboneSpec("iresnet18", 16, 32))[1].dim == 16
    with pytest.raises(ValueError, match="don't fit the model"):
        load_backbone(path, BackboneSpec("iresnet34", 16, 32))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_backbone(broken)


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bigvision.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_backbone(nn.Linear(2, 2), BackboneSpec("iresnet18"), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
