"""Compiled trees against scikit-learn's own: the same logits, on thresholds themselves, too."""

import numpy as np
import pytest
import torch

sklearn_ensemble = pytest.importorskip("sklearn.ensemble", reason="scikit-learn comes with the dev extras")
from compiled_trees import compiled  # noqa: E402
from vegetation_network import GROVE, Forest  # noqa: E402


def fitted(trees: int, leaves: int, features: int = 6, classes: int = 2):
    draw = np.random.default_rng(trees)
    x = draw.normal(size=(4000, features)).astype(np.float32)
    x[:, 0] = np.round(x[:, 0], 1)  # many ties
    x[:, 1] *= 1e-6  # as small as a variance of smooth ground
    score = x[:, 0] * x[:, 2] + np.sign(x[:, 1]) + 0.3 * draw.normal(size=4000)
    y = np.digitize(score, np.linspace(-0.5, 0.5, classes - 1)) if classes > 2 else score > 0
    model = sklearn_ensemble.HistGradientBoostingClassifier(
        max_iter=trees, max_leaf_nodes=leaves, learning_rate=0.2, random_state=0
    )
    return model.fit(x, y), x


def logits(model, leaves: int, x: np.ndarray) -> np.ndarray:
    forest = Forest(x.shape[1], len(model._predictors), leaves)
    forest.load_state_dict(compiled(model, leaves))
    with torch.inference_mode():
        return forest(torch.from_numpy(x.T.copy())[None, :, None]).flatten().numpy()


@pytest.mark.parametrize(("trees", "leaves"), [(1, 2), (GROVE, 8), (GROVE + 1, 15), (2 * GROVE + 5, 4)])
def test_logits_are_the_decision_function(trees: int, leaves: int) -> None:
    model, x = fitted(trees, leaves)
    np.testing.assert_allclose(logits(model, leaves, x), model.decision_function(x), rtol=0, atol=1e-5)


def test_a_feature_on_its_threshold_goes_where_scikit_learn_sends_it() -> None:
    model, x = fitted(20, 8)
    tables = [predictor.nodes for (predictor,) in model._predictors]
    splits = np.concatenate([table[table["is_leaf"] == 0] for table in tables])
    draw = np.random.default_rng(0)
    ties = np.empty((3000, x.shape[1]), np.float32)
    for feature in range(x.shape[1]):
        own = splits["num_threshold"][splits["feature_idx"] == feature]
        near = np.concatenate([own, [0.0]]).astype(np.float32)
        beside = [near, np.nextafter(near, np.float32(9)), np.nextafter(near, np.float32(-9))]
        ties[:, feature] = draw.choice(np.concatenate(beside), len(ties))
    np.testing.assert_allclose(logits(model, 8, ties), model.decision_function(ties), rtol=0, atol=1e-5)


def test_smaller_trees_are_filled_up_with_leaves_that_nothing_reaches() -> None:
    model, x = fitted(9, 5)
    np.testing.assert_allclose(logits(model, 12, x), model.decision_function(x), rtol=0, atol=1e-5)


def test_what_is_no_such_forest_is_refused() -> None:
    with pytest.raises(ValueError, match="3 classes"):
        compiled(fitted(2, 4, classes=3)[0], 4)
    with pytest.raises(ValueError, match="a tree has 8 leaves, more than 7"):
        compiled(fitted(2, 8)[0], 7)
    _, x = fitted(2, 4)
    x[::2] = np.nan
    missing = sklearn_ensemble.HistGradientBoostingClassifier(max_iter=2).fit(x, np.arange(len(x)) % 2)
    with pytest.raises(ValueError, match="by missing values"):
        compiled(missing, 31)
