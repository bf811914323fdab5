"""`bigvision process --route`, `--previous` and `bigvision plan --route` as they are typed."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from process_scenes import random_pixels, whole_image, write_scene
from typer.testing import CliRunner

from bigvision.cli import app
from bigvision.models.spec import load_model
from tiling import open_raster

FULL = "bigvision.models.small_unet:small_unet?in_channels=2&classes=3&width=8"  # stride 8
CHEAP = "bigvision.models.small_unet:small_unet?in_channels=2&classes=3&width=4&depth=1"  # stride 2
SIZE, REGION = (130, 150), 32
COMMON = ("--model", FULL, "--scale", "255", "--dtype", "float32")


def type_in(*arguments: str | Path) -> str:
    """What the command prints; it must succeed."""
    result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    return result.output


def rows_of(table: str, scene: str) -> list[str]:
    """The closing table's lines of one scene, which is its last."""
    lines = [line.strip() for line in table.splitlines()]
    (first,) = (at for at, line in enumerate(lines) if re.match(rf"{re.escape(scene)} +done", line))
    return lines[first:]


def route(folder: Path, budget: float) -> Path:
    path = folder / "ROUTE.toml"
    path.write_text(f'region = {REGION}\nbudget = {budget}\n[cheap]\nmodel = "{CHEAP}"\n')
    return path


@pytest.fixture
def pixels() -> NDArray[Any]:
    found = random_pixels((2, *SIZE))
    found[:, :64, :70] = 0  # 2 x 2 regions without data, and some with a part of it
    return found


def by_region(values: NDArray[Any]) -> dict[tuple[int, int], NDArray[Any]]:
    """The pixels of each region of an array [H, W]."""
    rows, cols = (range(-(-side // REGION)) for side in SIZE)
    return {
        (r, c): values[r * REGION : (r + 1) * REGION, c * REGION : (c + 1) * REGION]
        for r in rows
        for c in cols
    }


def unsure(logits: NDArray[np.float32], valid: NDArray[np.bool_], share: float) -> set[tuple[int, int]]:
    """The share of the regions with data whose classes have the highest mean entropy."""
    chances = torch.from_numpy(logits).double().softmax(0).numpy()
    doubt, seen = by_region(-(chances * np.log(chances)).sum(0)), by_region(valid)
    means = {cell: doubt[cell][shown].mean() for cell, shown in seen.items() if shown.any()}
    return set(sorted(means, key=means.__getitem__)[len(means) - int(share * len(means)) :])


def test_process_routes_and_says_where_regions_went(tmp_path: Path, pixels: NDArray[Any]) -> None:
    write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    command = ("process", tmp_path / "scene.tif", *COMMON, "--out", tmp_path / "out")
    output = type_in(*command, "--route", route(tmp_path, 0.25))
    image, valid = pixels / np.float32(255), (pixels != 0).any(0)
    cheap = whole_image(load_model(CHEAP), image, 2)
    full = whole_image(load_model(FULL), image, 8)
    chosen = unsure(cheap, valid, 0.25)
    assert len(chosen) == 5  # a quarter of 21
    expected = cheap.argmax(0)
    for cell, part in by_region(expected).items():  # views
        if cell in chosen:
            part[:] = by_region(full.argmax(0))[cell]
    expected[~valid] = 255
    assert np.array_equal(open_raster(tmp_path / "out" / "scene.tif").read()[0], expected)
    _, line = rows_of(output, "scene.tif")
    told = re.fullmatch(
        r"25 regions of 32 px: cheap 16 \(64%\), full 5 \(20%\), nodata 4 \(16%\); "
        r"\d+\.\d s, (\d+)% of the full network everywhere( \(routing did not pay\))?",
        line,
    )
    assert told and (int(told[1]) >= 100 or told[2] is None)


def test_process_says_when_routing_did_not_pay(tmp_path: Path) -> None:
    write_scene(tmp_path / "scene.tif", random_pixels((2, 64, 64)))
    common = ("process", tmp_path / "scene.tif", *COMMON, "--format", "zarr", "--overwrite")
    lines = [
        rows_of(type_in(*common, "--out", tmp_path / "out", "--route", route(tmp_path, budget)), "scene.tif")
        for budget in (0.0, 1.0)
    ]
    assert "full" not in lines[0][1].partition(";")[0] and "did not pay" not in lines[0][1]
    assert "full 4 (100%)" in lines[1][1]
    # The cheap network on top of the full one everywhere: more than 100 % however fast either is.
    told = re.search(r"(\d+)% of the full network everywhere \(routing did not pay\)$", lines[1][1])
    assert told and int(told[1]) >= 100


def test_process_copies_what_an_earlier_run_has(tmp_path: Path, pixels: NDArray[Any]) -> None:
    (tmp_path / "first").mkdir()
    write_scene(tmp_path / "first" / "scene.tif", pixels, nodata=0)
    pixels[:, 100, 140] += 1  # the lower right corner; the network reaches no farther than 32 px
    write_scene(tmp_path / "scene.tif", pixels, nodata=0)

    def process(scene: Path, out: str, *more: str | Path) -> list[str]:
        common = ("--output", "logits", "--tile", str(REGION), "--out", tmp_path / out)
        return rows_of(type_in("process", scene, *COMMON, *common, *more), "scene.tif")

    (first,) = process(tmp_path / "first" / "scene.tif", "earlier")
    assert first.endswith("earlier/scene.tif")
    _, line = process(tmp_path / "scene.tif", "reused", "--previous", tmp_path / "earlier")
    # Cut into 32 px: rows from 64 on (66 of them) by columns from 96 on (54) reach the pixel, and no others.
    saved = 1 - 66 * 54 / (SIZE[0] * SIZE[1])
    assert line == f"{saved:.0%} as in {tmp_path / 'earlier' / 'scene.tif'}"
    process(tmp_path / "scene.tif", "computed")
    one, other = (open_raster(tmp_path / out / "scene.tif").read() for out in ("reused", "computed"))
    assert one.tobytes() == other.tobytes()
    image = pixels / np.float32(255)
    expected = whole_image(load_model(FULL), image, 8)
    valid = (pixels != 0).any(0)
    assert np.allclose(one[:, valid], expected[:, valid], rtol=1e-4, atol=1e-5)


def test_plan_says_what_a_route_would_cost_and_whether_it_would_pay(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", random_pixels((2, 5 * REGION, 5 * REGION)))

    report = tmp_path / "plan.json"

    def planned(budget: float) -> str:
        output = type_in("plan", scene, *COMMON, "--route", route(tmp_path, budget), "--json", report)
        found = json.loads(report.read_text())
        lines = {line[:17].strip(): line[17:] for line in output.splitlines()}
        # Routed and unrouted seconds side by side, the latter as `computing time` has them.
        told = re.fullmatch(
            r"(\S+) s of computing here if they lie together, (\S+) s if scattered \(float32\), "
            r"(\S+ s) unrouted \(float32\)",
            lines["routed time"],
        )
        assert told and lines["computing time"].startswith(f"{told[3]} here")
        for text, value in ((told[1], "seconds_compact"), (told[2], "seconds_scattered")):
            assert float(text) == pytest.approx(found["route"][value], rel=0.06) and float(text) > 0
        return lines["routed"]

    pattern = (
        r"(\d+)% of the full network everywhere if the full regions lie together, (\d+)% if "
        r"scattered(: it would not pay)? \(25 regions, (\d+) of them in full\)"
    )
    for budget, full in ((0.24, 6), (1.0, 25)):
        told = re.match(pattern, planned(budget))
        assert told and int(told[4]) == full
        together, scattered = int(told[1]), int(told[2])
        # What is computed in full, at least; the cheap network comes on top of everything in full.
        assert 100 * full / 25 <= together <= scattered
        assert (told[3] is not None) == (full == 25) == (together > 100)
