"""The options of a training run, checked and turned into the values they name.

torch and the rooms that stand on it are imported where an option becomes one of their values, so that
`--help` is quick.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from bigvision.models.embedding import BackboneSpec
    from heads.adaptive import AdaptiveMargin
    from heads.gates import GateSpec
    from heads.margin import Margin
    from heads.optimizers import RowOptimizer

DTYPES = ("float32", "bfloat16", "float16")
GATE_FORMS = "all, sampled:RATE[:unbiased][:run=N], clustered:COUNT:OPENED[:epsilon=E] or hashed:TABLES:BITS"
MAPPED_RUN = 64  # classes drawn together where each read goes to a disk


@dataclass(frozen=True)
class TrainOptions:
    """Everything a training run can be told; the same names, with dashes, on the command line."""

    data: Annotated[
        str,
        "folder:PATH, rec:PATH, tar:PATTERN or synthetic:COUNT; "
        "@dense numbers labels without gaps, @24:40 selects identities",
    ]
    out: Annotated[Path, "folder of the run: checkpoints, curves, the trained backbone"]
    backbone: Annotated[str, "iresnet18/34/50/100/200, mobilefacenet[_large] or torchvision:NAME"] = (
        "iresnet18"
    )
    weights: Annotated[Path | None, "start from these weights (safetensors or a state dict)"] = None
    centres: Annotated[Path | None, "start from these class centres (of `bigvision face convert`)"] = None
    dim: Annotated[int, "width of the embedding"] = 512
    image_size: Annotated[int, "side of the square images in pixels"] = 112
    margin: Annotated[str, "m1,m2,m3, or adaface, or magface"] = "1,0.5,0"
    scale: Annotated[float, "s, the inverse temperature of the softmax"] = 64.0
    classes: Annotated[str, "number of identities, or auto: the data's own"] = "auto"
    active: Annotated[str, f"classes of a step: {GATE_FORMS}"] = "all"
    storage: Annotated[str, "the centres' numbers: float32, bfloat16 (stochastic rounding), float64"] = (
        "float32"
    )
    place: Annotated[str, "where the centres live: device, host, or a path (memory-mapped)"] = "device"
    head_optimizer: Annotated[str, "sgd, adagrad (row-wise) or adam"] = "sgd"
    inactive: Annotated[
        str,
        "classes left out of a step: frozen, or dense: moved by momentum and decay as if they weren't (sgd)",
    ] = "frozen"
    compiled: Annotated[str, "fuse the head's passes: auto (from 50000 classes a rank on), yes or no"] = (
        "auto"
    )
    batch_size: Annotated[int, "images of a step, of all ranks together"] = 128
    accumulate: Annotated[int, "parts in which a rank passes its images through the backbone"] = 1
    epochs: Annotated[float, "passes over the data"] = 20.0
    lr: Annotated[float, "peak learning rate, of backbone and head"] = 0.1
    momentum: Annotated[float, "of SGD"] = 0.9
    weight_decay: Annotated[float, "of backbone and head"] = 5e-4
    warmup: Annotated[float, "epochs of linear warm-up"] = 0.0
    schedule: Annotated[str, "polynomial, cosine or constant"] = "polynomial"
    power: Annotated[float, "of the polynomial schedule"] = 2.0
    clip: Annotated[float, "largest norm of the backbone's gradient (0: any)"] = 5.0
    dtype: Annotated[str, "of the backbone: float32, bfloat16, or float16 with a loss scaler"] = "float32"
    batch_norm: Annotated[str, "statistics over a rank's images (local) or all (global)"] = "local"
    augment: Annotated[str, "none, flip or light (shift, scale, turn, brightness too)"] = "flip"
    evaluate: Annotated[
        tuple[str, ...], "verify on these while training: bin:PATH or a source as in --data"
    ] = ()
    evaluate_every: Annotated[float, "epochs between evaluations"] = 1.0
    save_every: Annotated[int, "steps between checkpoints (0: an epoch)"] = 0
    keep: Annotated[int, "checkpoints kept"] = 2
    resume: Annotated[str, "none, auto (the last sound one in --out, if any) or a checkpoint"] = "none"
    changed: Annotated[
        tuple[str, ...], "settings that may differ from the checkpoint's: images, epochs, lr, active, ..."
    ] = ()
    max_damaged: Annotated[
        float, "largest share of damaged images, of the last thousand; more stop a run"
    ] = 0.1
    workers: Annotated[int, "processes a rank that decode images"] = 2
    memory: Annotated[
        str, "refuse to start above this much on this machine, e.g. 14GiB (auto: what is free)"
    ] = "auto"
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    log_every: Annotated[int, "steps between lines of the log"] = 10
    seed: Annotated[int, "of weights, order, augmentation and sampling"] = 0
    plan: Annotated[bool, "print the plan and stop"] = False

    def __post_init__(self) -> None:
        positive = {
            name: getattr(self, name) for name in ("dim", "batch_size", "accumulate", "keep", "log_every")
        }
        wrong = [f"{name} = {value}" for name, value in positive.items() if value < 1]
        wrong += [
            f"{name} = {value}"
            for name in ("epochs", "lr", "scale", "evaluate_every")
            if (value := getattr(self, name)) <= 0
        ]
        wrong += [
            f"{name} = {value}"
            for name in ("workers", "save_every", "clip", "warmup", "weight_decay", "seed")
            if (value := getattr(self, name)) < 0
        ]
        wrong += [f"seed = {self.seed}"] * (self.seed >= 2**63)
        if wrong:
            raise ValueError(f"out of range: {', '.join(wrong)}")
        if self.classes != "auto" and not (self.classes.isdecimal() and int(self.classes)):
            raise ValueError(f"--classes {self.classes} is neither auto nor a number from 1 on")
        _choose("dtype", self.dtype, DTYPES)
        _choose("compiled", self.compiled, ("auto", "yes", "no"))
        _choose("batch_norm", self.batch_norm, ("local", "global"))
        if self.memory != "auto":
            from bigvision.jobs.process.options import parse_bytes

            parse_bytes(self.memory)
        if not 0 <= self.max_damaged <= 1:
            raise ValueError(f"--max-damaged {self.max_damaged:g} is no share from 0 to 1")
        self.head_margin()
        self.head_optimizer_settings()
        self.gate()

    def network(self) -> "BackboneSpec":
        """The backbone that `backbone`, `dim` and `image_size` describe."""
        from bigvision.models.embedding import BackboneSpec

        return BackboneSpec(self.backbone, self.dim, self.image_size)

    def head_margin(self) -> "Margin | AdaptiveMargin":
        """The margin that `margin` names."""
        import heads

        if self.margin == "adaface":
            return heads.AdaFace()
        if self.margin == "magface":
            return heads.MagFace()
        try:
            parts = [float(part) for part in self.margin.split(",")]
            if len(parts) != 3:
                raise ValueError(f"{len(parts)} numbers")
        except ValueError as error:
            raise ValueError(
                f"margin {self.margin!r} is not m1,m2,m3, adaface or magface: {error}"
            ) from error
        return heads.Margin(*parts)

    def head_optimizer_settings(self) -> "RowOptimizer":
        """The fused optimiser that `head_optimizer` names."""
        import heads

        _choose("head_optimizer", self.head_optimizer, ("sgd", "adagrad", "adam"))
        kind = {"sgd": heads.SGD, "adagrad": heads.RowwiseAdagrad, "adam": heads.Adam}[self.head_optimizer]
        settings = {"momentum": self.momentum} if self.head_optimizer == "sgd" else {}
        return kind(lr=self.lr, weight_decay=self.weight_decay, inactive=self.inactive, **settings)

    def gate(self) -> "GateSpec | None":
        """The gate of the active classes that `active` names; None for all of them."""
        kind, *words = self.active.split(":")
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        values = [word for word in words if "=" not in word]
        if kind == "sampled" and self.place not in ("device", "host"):
            settings = {"run": str(MAPPED_RUN)} | settings
        try:
            if kind == "all" and not words:
                return None
            return GATES[kind](*values, **settings)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"active {self.active!r} is not {GATE_FORMS}: {error}") from error

    def class_count(self, found: int) -> int:
        """Identities of the head, for data with `found` of them; ValueError where it has fewer."""
        if self.classes == "auto":
            return found
        if int(self.classes) < found:
            raise ValueError(f"--classes {self.classes}, but {self.data} has {found} identities")
        return int(self.classes)

    def compiles(self, classes: int, ranks: int) -> bool:
        """Whether the head's kernels are compiled: building them, once, takes about a minute."""
        return self.compiled == "yes" or (self.compiled == "auto" and classes // ranks >= 50_000)

    def described(self) -> dict[str, Any]:
        """The options as plain values, for a file."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }


def _sampled(rate: str, unbiased: str = "", run: str = "1") -> "GateSpec":
    import heads

    if unbiased not in ("", "unbiased"):
        raise ValueError(f"{unbiased!r} is not unbiased")
    return heads.sampled(float(rate), unbiased=bool(unbiased), run=int(run))


def _clustered(count: str, opened: str, epsilon: str | None = None) -> "GateSpec":
    import heads

    return heads.clustered(int(count), int(opened), epsilon=None if epsilon is None else float(epsilon))


def _hashed(tables: str, bits: str) -> "GateSpec":
    import heads

    return heads.hashed(int(tables), int(bits))


GATES: dict[str, Callable[..., "GateSpec"]] = {
    "sampled": _sampled,
    "clustered": _clustered,
    "hashed": _hashed,
}


def _choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")


def parser(program: str) -> argparse.ArgumentParser:
    """An argument parser with one option a field."""
    made = argparse.ArgumentParser(
        program, description="Train a face backbone under a class-sharded margin head."
    )
    hints = get_type_hints(TrainOptions, include_extras=True)
    for entry in fields(TrainOptions):
        kind, text = get_args(hints[entry.name])
        flag = "--" + entry.name.replace("_", "-")
        if kind is bool:
            made.add_argument(flag, action="store_true", help=text)
            continue
        required = entry.default is MISSING
        shown = "" if required or entry.default in (None, ()) else f" ({entry.default})"
        many = get_origin(kind) is tuple
        made.add_argument(
            flag,
            type=next(iter(get_args(kind)), kind),
            required=required,
            default=None if required else entry.default,
            help=text + shown,
            nargs="*" if many else None,
        )
    return made


def parse(arguments: Sequence[str] | None = None, program: str = "train_face") -> TrainOptions:
    """Options from a command line. Raises ValueError for values that can't be; exits where argparse does."""
    found = vars(parser(program).parse_args(arguments))
    return TrainOptions(**found | {"evaluate": tuple(found["evaluate"])})
