"""One forecast of memory: what a plan accepts, its job accepts; what is predicted, is taken."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from train_runs import MODEL, WHOLE, quiet

from bigvision.jobs.plan import plan
from bigvision.jobs.process import process_scenes
from bigvision.jobs.process.options import Options
from bigvision.jobs.train_raster import train

NETWORK = """
from torch import nn

def bands(count, classes=4):
    return nn.Sequential(nn.Conv2d(count, 8, 1), nn.ReLU(), nn.Conv2d(8, classes, 3, padding=1))
"""


def write_bands(path: Path, count: int, height: int, width: int, dtype: str) -> str:
    """Noise in so many bands."""
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": dtype}
    with rasterio.open(path, "w", **profile, tiled=True, photometric="minisblack") as file:
        pixels = np.random.default_rng(0).integers(1, 200, (height, width)).astype(dtype)
        for band in range(count):
            file.write(pixels, 1 + band)
    return str(path)


def least(message: str) -> int:
    """The MiB that a refusal names."""
    found = re.search(r"at least --memory (\d+)MiB is needed", message)
    assert found is not None, message
    return int(found[1])


def refusal(job: Callable[[], object]) -> str:
    """What a job says of too little memory before it works, empty where it works."""
    try:
        job()
    except ValueError as error:
        assert "can't be met" in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize(("bands", "dtype", "width"), [(4, "uint8", 90), (12, "float32", 70)])
def test_plan_and_train_accept_the_same_memory(tmp_path: Path, bands: int, dtype: str, width: int) -> None:
    scene = write_bands(tmp_path / "scene.tif", bands, 80, width, dtype)
    write_bands(tmp_path / "labels.tif", 1, 80, width, "uint8")
    with rasterio.open(tmp_path / "labels.tif", "r+") as file:
        file.write(np.ones((80, width), np.uint8), 1)
    (tmp_path / "pairs.csv").write_text("scene,labels\nscene.tif,labels.tif\n")
    model = f"{MODEL}&in_channels={bands}"
    wishes = replace(WHOLE, model=model, epochs=1, rows=None, mean=None, std=None, scale=1.0)

    def planned(memory: str) -> str:
        found = plan(scene, Options(model, memory=memory, dtype="float32")).streaming
        assert found is not None
        return found.training_refused

    def trained(memory: str) -> str:
        run = tmp_path / memory
        return refusal(lambda: train(tmp_path / "pairs.csv", run, replace(wishes, memory=memory), quiet))

    needed = least(planned("1MiB"))
    assert least(trained("1MiB")) == needed
    for memory in (needed - 1, needed):
        assert bool(planned(f"{memory}MiB")) == bool(trained(f"{memory}MiB")) == (memory < needed)


@pytest.mark.parametrize("engine", ["stream", "tiles"])
def test_plan_and_process_accept_the_same_memory(
    tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = write_bands(tmp_path / "scene.tif", 4, 80, 90, "uint8")
    asked = Options(MODEL, dtype="float32", engine=engine)

    def processed(memory: str) -> bool:
        return process_scenes([scene], tmp_path / memory, replace(asked, memory=memory))

    needed = least(plan(scene, replace(asked, memory="1MiB")).refused)
    for memory in (needed - 1, needed):
        said = plan(scene, replace(asked, memory=f"{memory}MiB")).refused
        assert bool(said) == (memory < needed)
        assert processed(f"{memory}MiB") == (not said)
        assert not said or f"at least --memory {needed}MiB" in "".join(capsys.readouterr())


MEASURED = """
import resource, sys
from pathlib import Path
from bigvision.jobs.process import process_scenes
from bigvision.jobs.process.options import Options
done = process_scenes([sys.argv[1]], Path(sys.argv[2]), Options(sys.argv[3], dtype="float32", memory="8GiB"))
print(int(done) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("bands", "dtype"), [(4, "uint8"), (64, "uint8"), (64, "uint16"), (100, "float32")])
def test_predicted_peaks_are_near_those_measured(tmp_path: Path, bands: int, dtype: str) -> None:
    (tmp_path / "network.py").write_text(NETWORK)
    model = f"{tmp_path}/network.py:bands?count={bands}"
    scene = write_bands(tmp_path / "scene.tif", bands, 1500, 1500, dtype)
    cut = plan(scene, Options(model, dtype="float32", memory="8GiB")).cut
    assert cut is not None
    command = [sys.executable, "-c", MEASURED, scene, str(tmp_path / "out"), model]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    print(f"{bands} bands of {dtype}: {cut.predicted_bytes / measured:.2f} of {measured / 2**30:.2f} GiB")
    assert 0.85 <= cut.predicted_bytes / measured <= 1.8
