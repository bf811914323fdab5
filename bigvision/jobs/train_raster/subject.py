"""What a run trains: one network, or (with `--route`) a cascade of two and its gate."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from bigvision.jobs.train_raster.network import ClassLogits, build_network
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.jobs.train_raster.parallel import Ranks
from bigvision.jobs.train_raster.run_folder import RunFolder
from bigvision.jobs.train_raster.scene_steps import SceneSteps
from bigvision.jobs.train_raster.steps import CropSteps, Steps
from bigvision.jobs.train_raster.validation import Score, Validation
from bigvision.streaming.losses import Loss
from datasets.pairs import LabelledScene

Say = Callable[[str], None]


class Subject(Protocol):
    """What a run needs to know of what it trains."""

    @property
    def model(self) -> nn.Module:
        """All that is trained and checkpointed."""

    @property
    def classes(self) -> int:
        """K."""

    @property
    def files(self) -> tuple[str, ...]:
        """What decides the result besides scenes, model and weights, as far as it is a file."""

    def steps(self, scenes: Sequence[LabelledScene], loss: Loss, ranks: Ranks) -> Steps:
        """The training steps, ready to run."""

    def scorer(self, scenes: Sequence[LabelledScene], ranks: Ranks, say: Say) -> Callable[[], Score]:
        """What scores held-out scenes, as `bigvision process` would compute them, whenever it is called."""

    def save(self, folder: RunFolder) -> None:
        """Replace the run's weights."""

    def words(self, folder: RunFolder) -> list[str]:
        """What `bigvision process` must be told besides model, weights and normalisation."""


class OneNetwork:
    """A network by itself, on crops or whole scenes."""

    def __init__(self, options: TrainOptions, channels: int) -> None:
        self.options = options
        self.model: ClassLogits
        self.model, self.classes = build_network(options, channels)

    @property
    def files(self) -> tuple[str, ...]:
        """None."""
        return ()

    def steps(self, scenes: Sequence[LabelledScene], loss: Loss, ranks: Ranks) -> Steps:
        """Random crops, or whole scenes where they have no size."""
        make = CropSteps if self.options.crop else SceneSteps
        steps: Steps = make(scenes, self.options, loss, ranks)
        steps.prepare(self.model)
        return steps

    def scorer(self, scenes: Sequence[LabelledScene], ranks: Ranks, say: Say) -> Callable[[], Score]:
        """Whole scenes, streamed."""
        return Validation(self.model, scenes, self.options, self.classes, ranks, say)

    def save(self, folder: RunFolder) -> None:
        """`weights.safetensors`."""
        state: dict[str, Tensor] = self.model.network.state_dict()
        folder.save_weights(state)

    def words(self, folder: RunFolder) -> list[str]:
        """Nothing else."""
        return []
