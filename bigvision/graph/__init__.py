"""A network traced at its true size: shapes, FLOPs, bytes, receptive field, total stride.

traced = trace(model, (4, 30016, 30016))     # a second, no memory
geometry(traced)                             # total stride, exact halo, why tiles can't be exact
cost(traced)                                 # parameters, FLOPs, activation bytes
"""

from bigvision.graph.cost import Cost, OperatorCost, cost
from bigvision.graph.flow import flows
from bigvision.graph.fold import fold_batch_norm
from bigvision.graph.geometry import Geometry, geometry, padded_size, trace_padded
from bigvision.graph.layout import Flow, Layout, UnsupportedOperatorError
from bigvision.graph.outputs import OutputError, main_output
from bigvision.graph.trace import TracedGraph, UntraceableError, trace

__all__ = [
    "Cost",
    "Flow",
    "Geometry",
    "Layout",
    "OperatorCost",
    "OutputError",
    "TracedGraph",
    "UnsupportedOperatorError",
    "UntraceableError",
    "cost",
    "flows",
    "fold_batch_norm",
    "geometry",
    "main_output",
    "padded_size",
    "trace",
    "trace_padded",
]
