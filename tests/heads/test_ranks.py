"""The same head on 1, 2, 3 and 4 gloo ranks: results, errors, checkpoints and changes of identities."""

from typing import Any

import pytest
import torch
from torch import Tensor

Outcomes = dict[int, list[dict[str, Any]]]
EXACT = [
    "exact",
    "five classes",
    "large scale",
    "plain softmax",
    "sampled",
    "adagrad",
    "adam",
    "clustered",
    "adaptive",
]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", [*EXACT, "float32", "bfloat16", "resumed exact", "resumed sampled"])
def test_the_trajectory_does_not_depend_on_the_number_of_ranks(
    outcomes: Outcomes, name: str, size: int
) -> None:
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "large scale": 1e-8}.get(name, 1e-10)
    alone, together = outcomes[1][0][name], [rank[name] for rank in outcomes[size]]
    for rank in together:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=tolerance, abs=tolerance)
        torch.testing.assert_close(rank["centres"], alone["centres"], rtol=tolerance, atol=tolerance)
    for step, expected in enumerate(alone["gradients"]):
        found = torch.cat([rank["gradients"][step] for rank in together])
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["exact", "sampled", "adam", "clustered"])
def test_a_run_saved_on_four_ranks_goes_on_as_if_uninterrupted(
    outcomes: Outcomes, name: str, size: int
) -> None:
    uninterrupted, resumed = outcomes[4][0][name], outcomes[size][0][f"resumed {name}"]
    assert resumed["losses"] == pytest.approx(uninterrupted["losses"][2:], rel=1e-10)
    torch.testing.assert_close(resumed["centres"], uninterrupted["centres"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bad_input_on_one_rank_is_the_same_error_on_all(outcomes: Outcomes, size: int) -> None:
    first = outcomes[size][0]["complaints"]
    assert all(rank["complaints"] == first for rank in outcomes[size])
    bad = f"ValueError: rank {size - 1}: "
    assert first["label"] == bad + "label 37 (sample 1) is outside [-1, 37)"
    assert first["negative"] == bad + "label -2 (sample 2) is outside [-1, 37)"
    assert first["width"] == bad + "features must be floating [b, 6], got 2 dimension(s), the last of 5"
    assert first["finite"] == bad + "the features of sample 2 are not finite"
    assert first["kind"] == bad + "labels must be int64"
    assert first["count"] == bad + "labels must be one a sample, got 2"
    assert (
        "margin is 'Margin(m1=1.2, m2=0.3, m3=0.1)' there and 'Margin(m1=1.0, m2=0.0, m3=0.0)' here"
        in first["margin"]
    )
    assert "num_classes is 37 there and 36 here" in first["dim"]
    assert first["absent"].startswith("CheckpointError: loading") and "No such file" in first["absent"]
    assert first["place"].startswith(f"RanksError: placing the centres: rank {size - 1}: NotADirectoryError")
    assert first["unwritable"].startswith("CheckpointError: saving")
    if size > 1:
        spread = (
            f"RuntimeError: the centres are spread over {size} ranks: a state_dict has no room for them; use "
        )
        assert first["state"] == spread + "heads.save_head(head, folder) and heads.load_head(head, folder)"
        assert first["load"] == first["state"]
        assert "must be the same on every rank" in first["seed"]
        assert f"{size} ranks can't share {size - 1} classes" in first["ranks"]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_identities_join_leave_and_merge(outcomes: Outcomes, size: int) -> None:
    found = outcomes[size][0]["edited"]
    before: Tensor = found["before"]
    torch.testing.assert_close(found["more"][:37], before)
    assert len(found["more"]) == 41 and not torch.isin(found["more"][37:], before).any()
    keep = [i for i in range(37) if i not in (0, 17, 36)]
    torch.testing.assert_close(found["fewer"], before[keep])
    expected = before.clone()
    expected[3], expected[2] = (before[3] + before[30]) / 2, (before[8] + before[2] + before[20]) / 3
    keep = [i for i in range(37) if i not in (30, 8, 20)]
    torch.testing.assert_close(found["merged"], expected[keep])
    assert found["losses"] == pytest.approx(outcomes[1][0]["edited"]["losses"], rel=1e-10)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(outcomes: Outcomes, size: int) -> None:
    for rank in outcomes[size]:
        found = rank["skipping"]
        assert found["skipped"]
        # A loss multiplied by a scaler's scale moves the centres as the loss itself does.
        torch.testing.assert_close(found["centres"], outcomes[1][0]["skipping"]["centres"])
    gradients = torch.cat([rank["skipping"]["gradient"] for rank in outcomes[size]])
    torch.testing.assert_close(gradients, outcomes[1][0]["skipping"]["gradient"])
