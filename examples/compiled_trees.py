"""scikit-learn's boosted trees as the weights of `vegetation_network.Forest`.

Legend: F features; a tree has up to L leaves and L - 1 splits.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor
from vegetation_network import GROVE

# Features that differ in float32 differ by more than its inverse, unless they are tinier still.
STEEP = 2.0**64


def compiled(model: HistGradientBoostingClassifier, leaves: int) -> dict[str, Tensor]:
    """The state of a `Forest` whose logits are the model's `decision_function` on features of float32.

    Trees of fewer leaves are filled up with leaves that no pixel reaches.

    Raises:
        ValueError: more than two classes, a tree of more than `leaves` leaves, a split by category or by
            missing values.
    """
    if len(model._predictors[0]) != 1:
        raise ValueError(f"{len(model.classes_)} classes; a forest of two classes has one logit")
    tables = [predictor.nodes for (predictor,) in model._predictors]
    state = {}
    for number, first in enumerate(range(0, len(tables), GROVE)):
        grove = [_tree(table, model.n_features_in_, leaves) for table in tables[first : first + GROVE]]
        baseline = float(model._baseline_prediction.item()) if number == 0 else 0.0
        weights = _grove(grove) | {"values.bias": np.array([baseline])}
        state |= {
            f"groves.{number}.{name}": torch.from_numpy(value.astype(np.float32))
            for name, value in weights.items()
        }
    return state


Arrays = dict[str, NDArray[Any]]


def _grove(trees: list[Arrays]) -> Arrays:
    """Trees side by side: each one's leaves read its own splits only."""
    splits, leaves = trees[0]["paths"].shape[1], len(trees[0]["paths"])
    paths = np.zeros((len(trees), leaves, len(trees), splits))
    for at, tree in enumerate(trees):
        paths[at, :, at] = tree["paths"]
    values = np.concatenate([tree["values"] for tree in trees])
    return {
        "tests.weight": STEEP * np.concatenate([tree["tests"] for tree in trees])[..., None, None],
        "tests.bias": -STEEP * np.concatenate([tree["thresholds"] for tree in trees]),
        "paths.weight": paths.reshape(len(trees) * leaves, -1, 1, 1),
        "paths.bias": np.concatenate([1 - tree["rights"] for tree in trees]),
        "values.weight": values[None, :, None, None],
    }


def _tree(table: NDArray[Any], features: int, leaves: int) -> Arrays:
    """One tree: its tests [L - 1, F], thresholds, and leaves' paths [L, L - 1], turns to the right, values.

    A path has 1 where it goes right, -1 where it goes left; a leaf's pixels score as many as it has rights.
    """
    inner, ends = np.flatnonzero(table["is_leaf"] == 0), _leaves(table)
    if len(ends) > leaves:
        raise ValueError(f"a tree has {len(ends)} leaves, more than {leaves}")
    tests, thresholds = np.zeros((leaves - 1, features)), np.zeros(leaves - 1)
    tests[np.arange(len(inner)), table["feature_idx"][inner]] = 1
    thresholds[: len(inner)] = _float32_below(_thresholds(table, inner))
    paths, rights, values = np.zeros((leaves, leaves - 1)), np.ones(leaves), np.zeros(leaves)
    for leaf, (node, way) in enumerate(ends):
        for parent, right in way:
            paths[leaf, np.searchsorted(inner, parent)] = 1 if right else -1
        rights[leaf], values[leaf] = sum(right for _, right in way), table["value"][node]
    return {"tests": tests, "thresholds": thresholds, "paths": paths, "rights": rights, "values": values}


def _leaves(table: NDArray[Any]) -> list[tuple[int, list[tuple[int, bool]]]]:
    """Every leaf's node, and the way there: (split's node, whether it goes right)."""
    found, waiting = [], [(0, list[tuple[int, bool]]())]
    while waiting:
        node, way = waiting.pop()
        if table["is_leaf"][node]:
            found.append((node, way))
            continue
        for child, right in (("left", False), ("right", True)):
            waiting.append((int(table[child][node]), [*way, (node, right)]))
    return found


def _thresholds(table: NDArray[Any], inner: NDArray[np.intp]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = table["num_threshold"][inner]
    if table["is_categorical"][inner].any() or not np.isfinite(found).all():
        raise ValueError("a tree splits by category or by missing values")
    return found


def _float32_below(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The largest float32 that isn't above: any float32 is greater than both or than neither."""
    near = values.astype(np.float32)
    return np.where(near > values, np.nextafter(near, np.float32(-np.inf)), near)
