"""What the user asked of `bigvision train`, checked before any work starts."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bigvision.jobs.process.options import Options, parse_bytes
from bigvision.jobs.train_raster.losses import parse_terms
from bigvision.jobs.train_raster.optimisation import OPTIMIZERS, SCHEDULES

# With fewer a fresh network seldom gets beyond the commonest class, however exact each gradient is. Measured
# on small scenes: mean IoU 0.15 after 10 steps, 0.23 after 40, 0.49 after 120.
ENOUGH_STEPS = 100


@dataclass(frozen=True)
class TrainOptions:
    """One command's wishes. Pixels x enter the network as (x / scale - mean) / std; missing ones as 0.

    crop: rows and columns of a random crop; 0 trains on whole scenes, each step one exact gradient.
    batch: crops a step, over all ranks. Whole scenes take one scene a rank and step.
    epochs: None: 10, or of whole scenes as many as make `ENOUGH_STEPS`.
    class_weights: one number a class, or "balanced" (inverse frequency in the training labels).
    augment, jitter: turn and flip crops; random gains and offsets up to this, in normalised units.
    steps_per_epoch: by default as many as cover the training pixels once.
    memory: bytes that the process may take while it streams a scene, to learn from it or to score it.
    scratch, scratch_limit, rows: of a whole-scene step: a folder for states that don't fit in memory and the
        bytes they may take there, image rows a step of the scan (None: planned).
    checkpoint_every: steps; None: 100, or every one where a step is a whole scene.
    tensorboard: event files as well; the package tensorboard must be there.
    route: a ROUTE.toml: its cheap network and a learned gate are trained with the model as full network.
    """

    model: str
    weights: Path | None = None
    bands: tuple[int, ...] | None = None
    unscale: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float = 1.0
    loss: str = "cross_entropy"
    class_weights: tuple[float, ...] | str | None = None
    epochs: int | None = None
    crop: int = 256
    batch: int = 8
    steps_per_epoch: int | None = None
    augment: bool = True
    jitter: float = 0.0
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 0
    clip: float | None = None
    dtype: str = "float32"
    device: str = "auto"
    memory: str = "4GiB"
    rows: int | None = None
    scratch: Path | None = None
    scratch_limit: str = "40GiB"
    checkpoint_every: int | None = None
    seed: int = 0
    tensorboard: bool = False
    overwrite: bool = False
    route: Path | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", tuple(OPTIMIZERS)),
            ("schedule", tuple(SCHEDULES)),
            ("dtype", ("float32", "bfloat16")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        for name, least in (("crop", 0), ("batch", 1), ("warmup", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                )
        for name in ("epochs", "steps_per_epoch", "rows", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not self.lr > 0 or self.weight_decay < 0 or (self.clip is not None and not self.clip > 0):
            raise ValueError(
                f"--lr and --clip must be positive and --weight-decay not negative, got {self.lr}, "
                f"{self.clip} and {self.weight_decay}"
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(f"--jitter is at least 0 and below 1, got {self.jitter}")
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise ValueError(f"--class-weights {self.class_weights!r} is neither numbers nor balanced")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("--tensorboard needs the package tensorboard, which is not installed")
        if self.seed >= 2**63:
            raise ValueError(f"--seed must be below 2**63, got {self.seed}")
        parse_bytes(self.memory)
        parse_bytes(self.scratch_limit)
        parse_terms(self.loss)
        self.reading()

    def steps(self, per_epoch: int) -> int:
        """Of the whole run, with so many in an epoch."""
        few = 10 if self.crop else max(10, -(-ENOUGH_STEPS // per_epoch))
        return per_epoch * (self.epochs or few)

    @property
    def steps_a_checkpoint(self) -> int:
        """What a kill can cost at most."""
        return self.checkpoint_every or (100 if self.crop else 1)

    def reading(self) -> Options:
        """How scenes are opened and normalised: exactly as `bigvision process` does."""
        return Options(
            model=self.model,
            bands=self.bands,
            unscale=self.unscale,
            mean=self.mean,
            std=self.std,
            scale=self.scale,
        )
