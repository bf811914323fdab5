"""One network over an image too big for memory, exactly, forward and backward.

sm = StreamedModel(model, (4, 30000, 30000), dtype=torch.bfloat16)
for row, y in sm.stream(scene): ...                                 # rows of the whole image's output
result = sm.backward(scene, labels, CrossEntropy(ignore_index=255))   # exact gradients in model.parameters()
"""

from bigvision.streaming.backward import BackwardResult
from bigvision.streaming.checkpoints import BudgetError, CheckpointPlan, Scratch
from bigvision.streaming.forecast import Budget
from bigvision.streaming.model import StreamedModel
from bigvision.streaming.segments import CheckpointedSegments, checkpoint_segments
from bigvision.streaming.tape import NonFiniteError

__all__ = [
    "BackwardResult",
    "Budget",
    "BudgetError",
    "CheckpointPlan",
    "CheckpointedSegments",
    "NonFiniteError",
    "Scratch",
    "StreamedModel",
    "checkpoint_segments",
]
