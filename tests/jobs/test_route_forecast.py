"""What a route is predicted to cost, in FLOPs and in seconds, with a clock that is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
from process_scenes import random_pixels, write_scene

from bigvision.jobs.process import Options, route_forecast
from bigvision.jobs.process.route_forecast import Pace, RouteForecast, fitted, forecast_route
from bigvision.routing.boxes import Box
from bigvision.routing.scene import SceneRouter

FULL = "bigvision.models.small_unet:small_unet?in_channels=2&classes=3&width=8"
CHEAP = "bigvision.models.small_unet:small_unet?in_channels=2&classes=3&width=4&depth=1"
PACES = Pace(0.01, 3e-9), Pace(0.02, 1e-9)  # of cheap and full
Forecast = Callable[[float], RouteForecast]


def told(router: SceneRouter, expert: int, box: Box) -> float:
    """What a window takes at these paces."""
    return PACES[expert].window + PACES[expert].flop * router.flops(expert, box)


@pytest.fixture
def forecast(tmp_path: Path) -> Forecast:
    scene = write_scene(tmp_path / "scene.tif", random_pixels((2, 160, 160)))

    def of(budget: float) -> RouteForecast:
        route = tmp_path / "ROUTE.toml"
        route.write_text(f'region = 32\nbudget = {budget}\n[cheap]\nmodel = "{CHEAP}"\n')
        return forecast_route(str(scene), Options(model=FULL, scale=255.0, dtype="float32", route=route))

    return of


def test_the_whole_budget_is_spent_in_two_layouts(
    forecast: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route_forecast, "_best", told)
    found = forecast(0.25)
    compact, scattered = found.compact, found.scattered
    assert compact.experts[1].regions == scattered.experts[1].regions == 25 // 4
    assert 0.25 < compact.share < scattered.share < 1 and compact.pays
    assert compact.experts[1].rectangles < scattered.experts[1].rectangles
    nothing, everything = forecast(0.0).compact, forecast(1.0).compact
    assert nothing.share < compact.share < everything.share and not everything.pays


def test_seconds_are_those_of_windows_and_flops(forecast: Forecast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_forecast, "_best", told)
    found = forecast(0.25)
    for plan, seconds in ((found.compact, found.seconds_compact), (found.scattered, found.seconds_scattered)):
        (cheap, full), (a, b) = plan.experts, PACES
        assert cheap.rectangles == 1
        expected = a.window + a.flop * cheap.flops + full.rectangles * b.window + b.flop * full.flops
        assert seconds == pytest.approx(expected, rel=1e-6)
    assert found.seconds_scattered > found.seconds_compact
    record = found.record()
    assert record["seconds_compact"] == found.seconds_compact and record["pays"] is True


def test_a_pace_is_never_negative() -> None:
    assert fitted((1e6, 0.5), (1e8, 5.45)) == pytest.approx((0.45, 5e-8))
    assert fitted((1e6, 0.5), (1e8, 0.4)) == (0.0, 0.4 / 1e8)  # a hiccup in the small window
    assert fitted((1e8, 0.4), (1e8, 0.4)) == (0.0, 0.4 / 1e8)  # a scene of one region
    window, flop = fitted((1e6, 0.001), (1e8, 5.0))  # dearer a FLOP when large
    assert window >= 0 and flop == 5.0 / 1e8


def test_a_clock_that_nobody_tells_runs(forecast: Forecast) -> None:
    found = forecast(0.25)
    assert 0 < found.seconds_compact < 60 and 0 < found.seconds_scattered < 60 and found.dtype == "float32"
