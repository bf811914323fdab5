"""`bigvision face`: every subcommand from words to output."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bigvision.cli.face import app
from bigvision.jobs.faces import launch
from bigvision.models.embedding import BackboneSpec, build_backbone, save_backbone
from tiling.lock import locked

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


RUN = ("--data", "synthetic:40", "--backbone", "mobilefacenet", "--image-size", "16", "--batch-size", "8")


def started(monkeypatch: pytest.MonkeyPatch, why: str | None = None) -> list[list[str]]:
    """What is started instead of ranks, which stop themselves for a reason."""
    seen: list[list[str]] = []

    def run(words: list[str], meeting: Path) -> int:
        if why is not None:
            (meeting / launch.STOPPED).write_text(json.dumps({"why": why}))
        seen.append(words)
        return 0

    monkeypatch.setattr(launch, "_run", run)
    return seen


def test_it_hands_training_to_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, sets = started(monkeypatch), ("synthetic:4", "synthetic:5")
    call("train", "--nproc-per-node", 2, *RUN, "--out", tmp_path / "run", "--evaluate", *sets)
    assert "--max-restarts 3 -m bigvision.jobs.train_face" in " ".join(seen[0])
    assert seen[0][-3:] == ["--evaluate", *sets]


def test_a_run_that_stopped_itself_ends_with_its_own_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started(monkeypatch, why="step 7: the loss is nan")
    with pytest.raises(ValueError, match="step 7: the loss is nan"):
        launch.launch([*RUN, "--out", str(tmp_path)], ranks=2, max_restarts=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "{here}"], "did you mean folder:{here}"),
        (["--data", "folder:{here}/none"], "none is not a folder of identities"),
        (["--batch-size", "4000"], "a batch of 4000 is more than the 640 images"),
        (["--batch-size", "4000", "--plan"], "a batch of 4000 is more than the 640 images"),
        (["--backbone", "resnet"], "backbone 'resnet' is none of"),
        (["--weights", "{here}/none.pt"], "there is no {here}/none.pt"),
        (["--centres", "{here}/none"], "there is no {here}/none"),
        (["--memory", "1MiB"], "1 MiB are available"),
        (["--evaluate", "synthetic:4x1"], "verification needs two identities and one with two images"),
        (["--resume", "auto", "--out", "{here}/taken"], "another process is training in {here}/taken"),
        (["--out", "{here}/done"], "done holds a run up to step-00000075: --resume auto"),
    ],
)
def test_what_can_be_known_is_refused_before_ranks_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    seen = started(monkeypatch)
    (tmp_path / "done" / "checkpoints" / "step-00000075").mkdir(parents=True)
    (tmp_path / "taken").mkdir()
    arguments = [*RUN, "--out", str(tmp_path / "run"), *(word.format(here=tmp_path) for word in words)]
    with (
        locked(launch.lock_of(tmp_path / "taken"), ""),
        pytest.raises(ValueError, match=re.escape(message.format(here=tmp_path))),
    ):
        launch.launch(arguments, ranks=2, max_restarts=3)
    assert not seen and not (tmp_path / "run").exists()


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
