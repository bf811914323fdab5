"""How a scene is streamed, in figures, and the numbers of rows a step that are worth trying."""

from __future__ import annotations

from dataclasses import dataclass

from bigvision.streaming.checkpoints import CheckpointPlan
from bigvision.streaming.program import Program

# A step of about a million pixels is long enough to be efficient and short enough for the caches. Measured
# on a U-Net: at width 30000, 32 rows are as quick as 64 in bfloat16 on AMX and 1.2 times so in float32; 16
# are not. At width 8192, 64 to 224 rows are within 6 %; at 1024 and 4096, 128 to 256 are best.
PIXELS_A_STEP = 1_000_000
MOST_ROWS = 256


@dataclass(frozen=True)
class StreamPlan:
    """What one forward stream takes.

    Attributes:
        rows: image rows a step.
        steps: of all passes together.
        passes: walks over the image, one more than there are stages of statistics over it.
        engine_bytes: the most that buffers, results and weights take at once.
        peak_bytes: that and what the process holds already: its predicted peak.
        flops: of all passes together.
        recomputation: FLOPs done more than once, as a share of one dense forward.
        scratch_bytes: the most that values between passes take in scratch storage.
        training: how every pass would be differentiated under the same memory; None where it can't be.
    """

    rows: int
    steps: int
    passes: int
    engine_bytes: int
    peak_bytes: int
    flops: int
    recomputation: float
    scratch_bytes: int
    training: tuple[CheckpointPlan, ...] | None


def row_choices(height: int, width: int, stride: int) -> list[int]:
    """Image rows a step that are worth trying, the best first and each half of the one before, down to 1."""
    most = min(PIXELS_A_STEP // width, MOST_ROWS, height)
    most = most // stride * stride or min(stride, height)
    return [most >> shift for shift in range(most.bit_length())]


def pass_flops(program: Program) -> list[int]:
    """FLOPs of every pass."""
    return [
        sum(stage.flops for stage in walk.stages if stage.node not in walk.given) for walk in program.passes
    ]
