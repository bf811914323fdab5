"""`bigvision face`: every subcommand from words to output."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bigvision.cli.face import app
from bigvision.jobs.faces import launch
from bigvision.models.embedding import BackboneSpec, build_backbone, save_backbone

SPEC = BackboneSpec("mobilefacenet", 16, 32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    model = build_backbone(SPEC).train()
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    save_backbone(model, SPEC, path)
    return path


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_it_evaluates(weights: Path, tmp_path: Path) -> None:
    text = call("eval", "--weights", weights, "--data", "synthetic:6x4", "--report", tmp_path / "r.json")
    assert "synthetic:6x4: 24 images, 0 damaged" in text
    assert "rank-1" in text
    assert (tmp_path / "r.json").exists()


def test_it_exports(weights: Path, tmp_path: Path) -> None:
    assert "of torch" in call("export", "--weights", weights, "--out", tmp_path / "face.pt2")


def test_it_converts_weights_and_configs(tmp_path: Path) -> None:
    torch.save(build_backbone(SPEC).state_dict(), tmp_path / "backbone.pth")
    text = call("convert", tmp_path / "backbone.pth")
    assert "mobilefacenet, dim 16, 32 pixels" in text
    assert (tmp_path / "backbone.safetensors").exists()
    (tmp_path / "c.py").write_text("config.network = 'r18'\nconfig.lr = 0.1\nconfig.verbose = 2000\n")
    text = call("convert", tmp_path / "c.py", "--ranks", 2)
    assert "bigvision face train --backbone iresnet18 --active all --batch-size 256" in text
    assert "no counterpart: verbose = 2000" in text


def test_it_indexes_and_identifies(weights: Path, tmp_path: Path, shared_data: Path) -> None:
    faces = shared_data / "faces" / "orl"
    text = call("index", "--weights", weights, "--data", f"folder:{faces}@0:4", "--out", tmp_path / "gallery")
    assert "4 embeddings of 4 identities" in text
    text = call("identify", "--weights", weights, "--gallery", tmp_path / "gallery", faces / "s1" / "1.pgm")
    assert "1.pgm  s" in text


def test_it_hands_training_to_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(launch.subprocess, "run", lambda words, check: seen.append(words) or Done())
    call(
        "train",
        "--nproc-per-node",
        2,
        "--data",
        "synthetic:4",
        "--out",
        "run",
        "--evaluate",
        "bin:a",
        "bin:b",
    )
    assert "--max-restarts 3 -m bigvision.jobs.train_face" in " ".join(seen[0])
    assert seen[0][-3:] == ["--evaluate", "bin:a", "bin:b"]


def test_a_refused_run_ends_with_its_own_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Refused:
        returncode = 1

    def run(words: list[str], check: bool) -> Refused:
        (tmp_path / "stopped.json").write_text('{"why": "nowhere is not a folder of identities"}')
        return Refused()

    monkeypatch.setattr(launch.subprocess, "run", run)
    arguments = ["--data", "folder:nowhere", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        launch.launch(arguments, ranks=2, max_restarts=3)


def test_a_folder_with_another_run_is_refused_before_ranks_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    (tmp_path / "checkpoints" / "step-00000075").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run up to step-00000075: --resume auto"):
        launch.launch(["--data", "synthetic:4", "--out", str(tmp_path)], ranks=1, max_restarts=3)


def test_weights_that_do_not_exist_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.safetensors do not exist"):
        call("export", "--weights", tmp_path / "none.safetensors", "--out", tmp_path / "face.pt2")


def test_it_is_mounted_beside_the_raster_commands() -> None:
    from bigvision.cli import app as whole

    result = CliRunner().invoke(whole, ["face", "--help"])
    assert all(name in result.output for name in ("train", "eval", "convert", "export", "index", "identify"))


def test_training_has_its_help() -> None:
    text = call("train", "--help")
    assert "--nproc-per-node" in text
    assert "--active" in text


def test_the_help_of_train_is_quick() -> None:
    program = (
        "import sys\nfrom bigvision.cli import app\n"
        "app(['face', 'train', '--help'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--batch-size" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
