"""Everything that can be known of a run before its ranks start: data, labels, evaluations, memory."""

from dataclasses import dataclass

from bigvision.jobs.faces.evaluation import check_verifiable, open_evaluation
from bigvision.jobs.faces.options import TrainOptions
from bigvision.jobs.faces.plan import Plan, make_plan
from datasets.face_batches import FEWEST, TrainingBatches
from datasets.face_images import FaceSource
from datasets.face_index import left_out_text
from datasets.faces import check_labels, listing_bytes, open_faces


@dataclass(frozen=True)
class Prepared:
    """A run's data and plan.

    Attributes:
        source: the images.
        batches: one rank's part of each step.
        evaluations: the sets that are verified on, by name.
        plan: the run's length and memory.
        told: what there is to say of the data.
    """

    source: FaceSource
    batches: TrainingBatches
    evaluations: dict[str, FaceSource]
    plan: Plan
    told: list[str]

    def lines(self) -> list[str]:
        """What a person reads first."""
        return [*self.told, *self.plan.lines()]


def prepare(options: TrainOptions, rank: int, ranks: int, ranks_here: int) -> Prepared:
    """Open the data of one of `ranks` ranks, `ranks_here` of them on this machine, and plan.

    Raises ValueError or OSError for data that isn't there or can't be trained or verified on, and options
    that don't go with it. Whether the memory is there is the plan's `check`.
    """
    missing = [path for path in (options.weights, options.centres) if path and not path.exists()]
    if missing:
        raise ValueError(f"there is no {missing[0]}")
    source = open_faces(options.data, size=options.image_size)
    gaps = check_labels(source, options.data) if rank == 0 else ""
    left_out = left_out_text(getattr(source, "left_out", {}))
    classes = options.class_count(source.num_classes)
    batches = TrainingBatches(
        source,
        options.batch_size,
        rank=rank,
        world=ranks,
        seed=options.seed,
        size=options.image_size,
        augment=options.augment,
        fewest=FEWEST * parts(options, ranks),
    )
    evaluations = {spec: open_evaluation(spec, options.image_size) for spec in options.evaluate}
    for spec, pairs in evaluations.items():
        check_verifiable(pairs, spec)
    plan = make_plan(options, classes, len(source), ranks, ranks_here, listing_bytes(source))
    return Prepared(source, batches, evaluations, plan, [text for text in (gaps, left_out[2:]) if text])


def parts(options: TrainOptions, ranks: int) -> int:
    """Parts in which every rank passes its images, as many on one with damaged records as on the others."""
    return max(1, min(options.accumulate, options.batch_size // ranks // FEWEST))
