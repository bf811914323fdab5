"""One rule a family of operators: whether its result streams or is held, and what its rows read."""

from bigvision.graph.rules import moved_axes, resampled, row_by_row, statistics, windows
from bigvision.graph.rules.registry import RULES

__all__ = ["RULES", "moved_axes", "resampled", "row_by_row", "statistics", "windows"]
