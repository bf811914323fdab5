import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import Anneal, ExpertChoice, Threshold, TopK

numbers = st.floats(-10, 10)


@given(numbers, numbers, st.integers(0, 20), st.integers(-5, 40), st.sampled_from(["linear", "cosine"]))
def test_an_annealed_number_starts_ends_and_stays_between(
    begin: float, end: float, steps: int, step: int, curve: str
) -> None:
    anneal = Anneal(begin, end, steps, curve)  # type: ignore[arg-type]
    assert anneal.at(0) == (begin if steps else end)
    assert anneal.at(max(step, 0) + steps) == end
    low, high = sorted((begin, end))
    assert low - 1e-9 <= anneal.at(step) <= high + 1e-9
    moved = [anneal.at(i) for i in range(steps + 1)]
    assert moved == sorted(moved, reverse=begin > end)


def test_halfway() -> None:
    assert Anneal(8, 2, 10).at(5) == 5
    assert Anneal(8, 2, 10, "cosine").at(5) == pytest.approx(5)
    assert Anneal(8, 2, 10, "cosine").at(1) > Anneal(8, 2, 10).at(1)


def test_bad_input_is_refused_with_its_values() -> None:
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Anneal(1, 0, -1)
    with pytest.raises(ValueError, match="'step'"):
        Anneal(1, 0, 3, "step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got -1"):
        TopK(-1)
    with pytest.raises(ValueError, match="end=-1"):
        TopK(Anneal(3, -1, 5))
    with pytest.raises(ValueError, match=r"0\.\.1, got 1\.5"):
        ExpertChoice(1.5)
    with pytest.raises(ValueError, match=r"at least 0, got -0\.1"):
        Threshold(0.5, gap=-0.1)
