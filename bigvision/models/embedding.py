"""Face backbones by name, their files, and an embedding layer on top of any classifier.

Shapes: x [B, 3, S, S] -> [B, dim].
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from bigvision.models.iresnet import iresnet18, iresnet34, iresnet50, iresnet100, iresnet200
from bigvision.models.mobilefacenet import mobilefacenet, mobilefacenet_large
from bigvision.models.weights import load_weights
from bigvision.tensors import save_tensors
from tiling.publish import complete

FACE_BACKBONES: dict[str, Callable[[int, int], nn.Module]] = {
    "iresnet18": iresnet18,
    "iresnet34": iresnet34,
    "iresnet50": iresnet50,
    "iresnet100": iresnet100,
    "iresnet200": iresnet200,
    "mobilefacenet": mobilefacenet,
    "mobilefacenet_large": mobilefacenet_large,
}
KIND = "bigvision face backbone"


@dataclass(frozen=True)
class BackboneSpec:
    """What has to be known to build a backbone again; stands in the metadata of its weights' file."""

    name: str  # one of FACE_BACKBONES, or torchvision:NAME
    dim: int = 512
    image_size: int = 112


class EmbeddingNet(nn.Module):
    """A network whose classification layer gives way to an embedding: linear, then batch norm of fixed gain.

    The last `nn.Linear` of `trunk` is replaced. Raises ValueError where there is none.
    """

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        linear = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"{type(trunk).__name__} has no linear layer to replace by an embedding")
        parent, _, child = linear[-1].rpartition(".")
        last = trunk.get_submodule(linear[-1])
        assert isinstance(last, nn.Linear)
        setattr(trunk.get_submodule(parent), child, nn.Linear(last.in_features, dim, bias=False))
        self.trunk = trunk
        self.features = nn.BatchNorm1d(dim)
        self.features.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, dim] of images [B, 3, S, S]."""
        embeddings: Tensor = self.features(self.trunk(x))
        return embeddings


def build_backbone(spec: BackboneSpec) -> nn.Module:
    """Build a face backbone, freshly initialised from torch's generator.

    Raises ValueError for an unknown name, naming the known ones, and for sizes that can't be.
    """
    if spec.dim < 1:
        raise ValueError(f"an embedding of {spec.dim} numbers")
    if spec.name in FACE_BACKBONES:
        return FACE_BACKBONES[spec.name](spec.dim, spec.image_size)
    library, _, name = spec.name.partition(":")
    if library == "torchvision":
        from torchvision import models

        if name not in models.list_models(module=models):
            raise ValueError(f"torchvision has no classifier {name!r}")
        return EmbeddingNet(models.get_model(name, weights=None), spec.dim)
    raise ValueError(f"backbone {spec.name!r} is none of {', '.join(FACE_BACKBONES)}, torchvision:NAME")


def save_backbone(model: nn.Module, spec: BackboneSpec, path: str | Path) -> None:
    """Write weights as safetensors that say what they are; the file appears when it is complete."""
    described = {"kind": KIND, "name": spec.name, "dim": str(spec.dim), "image_size": str(spec.image_size)}
    with complete(Path(path)) as place:
        save_tensors(model.state_dict(), place, described)


def read_backbone_spec(path: str | Path) -> BackboneSpec | None:
    """What a file of weights says it is; None where it doesn't (a foreign file)."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"weights {path} are no readable safetensors: {error}") from error
    if described.get("kind") != KIND:
        return None
    return BackboneSpec(described["name"], int(described["dim"]), int(described["image_size"]))


def load_backbone(path: str | Path, spec: BackboneSpec | None = None) -> tuple[nn.Module, BackboneSpec]:
    """A backbone with its weights, in eval mode. `spec` is needed only where the file doesn't say what it is.

    Raises ValueError where the file is not readable, says nothing of itself, or doesn't fit.
    """
    if not Path(path).exists():
        raise ValueError(f"weights {path} do not exist")
    found = read_backbone_spec(path)
    if found is None and spec is None:
        raise ValueError(
            f"weights {path} don't say which backbone they are for: name it (--backbone iresnet50, ...)"
        )
    chosen = found or spec
    assert chosen is not None
    model = build_backbone(chosen)
    load_weights(model, Path(path))
    return model.eval(), chosen
