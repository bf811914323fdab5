"""One arithmetic a command, judged by what is written."""

from pathlib import Path

import pytest
import torch
from process_scenes import random_pixels, write_scene

from bigvision.jobs.process import Options, process_scenes
from bigvision.jobs.process.results import ResultKind
from tiling import open_raster

NETWORKS = Path(__file__).with_name("process_networks.py")


@pytest.fixture(autouse=True)
def _fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("precision", "batch_precision"):
        monkeypatch.setattr(f"bigvision.jobs.process.{place}.has_fast_bfloat16", lambda device: True)


def dtypes(folder: Path) -> set[str]:
    return {open_raster(path).tags["BIGVISION_DTYPE"] for path in folder.glob("*.tif")}


def test_all_scenes_of_a_command_have_one_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, each of these scenes would choose for itself; a batch that grows keeps what it has."""
    from bigvision.jobs.process import batch_precision, precision

    (tmp_path / "in").mkdir()
    scenes = [str(write_scene(tmp_path / "in" / f"{k}.tif", random_pixels((3, 40, 40), k))) for k in range(3)]
    verdicts = iter(["bfloat16"])
    monkeypatch.setattr(batch_precision, "judged", lambda *rest: precision.Precision(next(verdicts), 0.9995))
    alone = iter(["float32", "bfloat16", "float32", "bfloat16"])
    monkeypatch.setattr(precision, "judged", lambda *rest: precision.Precision(next(alone), 0.5))
    options = Options(f"{NETWORKS}:random_net?seed=6")
    assert process_scenes(scenes[:2], tmp_path / "out", options)
    assert dtypes(tmp_path / "out") == {"bfloat16"}
    assert process_scenes(scenes, tmp_path / "out", options)  # judged no second time
    assert dtypes(tmp_path / "out") == {"bfloat16"}
    assert len(list((tmp_path / "out").glob("*.tif"))) == 3


def test_what_is_written_decides() -> None:
    """Two outputs of one class whose probabilities differ by 0.1, and whose logits do by a tenth."""
    one = torch.tensor([2.0, 0.0]).view(2, 1, 1).expand(2, 1, 2).contiguous()
    other = one.clone()
    other[0, 0, 1] = 1.2
    assert ResultKind("classes", 2, 0.5).alike(one, other).tolist() == [[True, True]]
    assert ResultKind("probabilities", 2, 0.5).alike(one, other).tolist() == [[True, False]]
    assert ResultKind("logits", 2, 0.5).alike(one, other).tolist() == [[True, False]]
