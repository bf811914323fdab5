"""Training on labelled scenes: it learns, resumes exactly, averages over ranks, refuses what doesn't fit."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from train_runs import (
    FAST,
    MODEL,
    WHOLE,
    assert_same_run,
    interrupted_at,
    quiet,
    weights_of,
    whole_image,
    write_networks,
    write_pairs,
)

from bigvision.jobs.train_raster import TrainOptions, train
from bigvision.jobs.train_raster.curves import draw_curves, read_curve
from bigvision.jobs.train_raster.losses import build_loss
from bigvision.jobs.train_raster.scene_steps import SceneSteps
from bigvision.jobs.train_raster.steps import CropSteps
from bigvision.models.spec import load_model
from datasets.scene_files import write_scene
from datasets.scenes import Scene
from datasets.streams import Use, stream


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("scenes"))


def test_training_learns_and_leaves_what_process_takes(pairs: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = replace(FAST, epochs=3, steps_per_epoch=12, batch=4)
    result = train(pairs, tmp_path / "run", options, said.append)
    losses = [row["loss"] for row in read_curve(tmp_path / "run" / "training.csv")]
    assert len(losses) == result.steps == 36
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])
    assert result.score is not None and set(result.score) >= {"mean_iou", "accuracy", "iou_4"}
    load_model(MODEL, result.weights)
    assert f"--model '{MODEL}' --weights {result.weights} --scale 255 --mean 0.4 --std 0.2" in result.command
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "mean IoU" in said[-1]
    draw_curves(read_curve(tmp_path / "run" / "training.csv"), [], 5, tmp_path / "unscored.png")
    widths = [Image.open(tmp_path / name).width for name in ("run/curves.png", "unscored.png")]
    assert widths == [900, 450]  # no panel for scores that there are none of
    train(pairs, tmp_path / "run", options, said.append)
    assert "finished already (36 steps)" in said[-1]


def test_a_run_stopped_anywhere_ends_like_one_that_was_not(pairs: Path, tmp_path: Path) -> None:
    options = replace(FAST, epochs=3, checkpoint_every=2, warmup=2)
    train(pairs, tmp_path / "whole", options, quiet)
    for stop in (1, 5, 8):
        interrupted_at(CropSteps, stop, lambda: train(pairs, tmp_path / "parts", options, quiet))
    train(pairs, tmp_path / "parts", options, quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bigvision.jobs.train_raster import TrainOptions, train
train(Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3]))
"""


def command(pairs: Path, out: Path, options: TrainOptions) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(pairs), str(out), repr(options)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(replace(FAST, epochs=4, steps_per_epoch=12, checkpoint_every=4), id="crops"),
        pytest.param(replace(WHOLE, epochs=24, checkpoint_every=4), id="whole", marks=pytest.mark.slow),
    ],
)
def test_kill_9_loses_nothing(pairs: Path, tmp_path: Path, options: TrainOptions) -> None:
    killed = subprocess.Popen(command(pairs, tmp_path / "parts", options))
    curve = tmp_path / "parts" / "training.csv"
    deadline = time.monotonic() + 120
    while len(read_curve(curve)) < 15 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 15 <= len(read_curve(curve)) < 48
    with curve.open("a") as file:
        file.write("16,0.0")  # a row torn by the kill
    for out in ("parts", "whole"):
        subprocess.run(command(pairs, tmp_path / out, options), check=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def launch(pairs: Path, out: Path, options: TrainOptions) -> None:
    """Train on two ranks."""
    script = out.with_name("script.py")
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(script), str(pairs), str(out), repr(options)]
    subprocess.run([*launcher, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_ranks_take_the_step_of_one(pairs: Path, tmp_path: Path) -> None:
    # Without batch norm, whose statistics are a rank's own, halves of a batch average to the whole.
    model = f"{write_networks(tmp_path)}:plain"
    options = replace(FAST, model=model, batch=4, optimizer="sgd", epochs=1, loss="cross_entropy")
    launch(pairs, tmp_path / "two", options)
    train(pairs, tmp_path / "one", options, quiet)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    scores = [read_curve(tmp_path / out / "validation.csv")[-1]["accuracy"] for out in ("one", "two")]
    assert abs(scores[0] - scores[1]) < 1e-3


def test_a_network_with_one_channel_learns_two_classes(tmp_path: Path) -> None:
    scene = Scene(128, 128, seed=0)
    write_scene(scene, tmp_path / "a.tif")
    labels = (scene.labels(0, 0, 128, 128) == 2).astype(np.uint8)
    write_scene(scene, tmp_path / "b.tif", labels=True)
    import rasterio

    with rasterio.open(tmp_path / "b.tif", "r+") as file:
        file.write(labels, 1)
    (tmp_path / "pairs.csv").write_text("scene,labels\na.tif,b.tif\n")
    options = replace(FAST, model=MODEL + "&classes=1", class_weights="balanced", loss="0.5*dice+focal")
    result = train(tmp_path / "pairs.csv", tmp_path / "run", options, quiet)
    assert load_file(result.weights)["head.0.weight"].shape[0] == 4
    assert result.score is None


SGD = replace(WHOLE, rows=16, epochs=1, optimizer="sgd", lr=0.1, schedule="constant", weight_decay=0.0)


def whole_gradients(model: torch.nn.Module, seed: int, loss: str) -> None:
    """Add the gradient over a whole scene, padded to the network's stride, by plain autograd."""
    image, truth = whole_image(seed)
    height, width = image.shape[2:]
    logits = model(F.pad(image, (0, -width % 4, 0, -height % 4)))[..., :height, :width]
    build_loss(loss)(logits, truth).backward()


def assert_weights(found: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_whole_scenes_take_the_gradient_of_all_their_pixels(pairs: Path, tmp_path: Path) -> None:
    train(pairs, tmp_path / "run", replace(SGD, memory="2GiB", loss="dice+focal"), quiet)
    model = load_model(MODEL).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    order = stream(Use.SCENE_ORDER, 0, 0).permutation(2)
    for seed in order:
        optimizer.zero_grad()
        whole_gradients(model, int(seed), "dice+focal")
        optimizer.step()
    assert_weights(load_file(tmp_path / "run" / "weights.safetensors"), model)


@pytest.mark.slow
def test_two_ranks_take_a_scene_each_and_average_their_gradients(pairs: Path, tmp_path: Path) -> None:
    launch(pairs, tmp_path / "two", replace(SGD, epochs=2))
    model = load_model(MODEL).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        for seed in (0, 1):
            whole_gradients(model, seed, "cross_entropy")
        for parameter in model.parameters():
            parameter.grad /= 2
        optimizer.step()
    assert_weights(load_file(tmp_path / "two" / "weights.safetensors"), model)


@pytest.mark.slow
def test_whole_scene_runs_resume_and_ask_for_possible_memory(pairs: Path, tmp_path: Path) -> None:
    options = replace(WHOLE, epochs=2)
    train(pairs, tmp_path / "whole", options, quiet)
    interrupted_at(SceneSteps, 3, lambda: train(pairs, tmp_path / "parts", options, quiet))
    train(pairs, tmp_path / "parts", options, quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(
        ValueError,
        match=r"--memory 10kB can't be met: one differentiated step over .* at least --memory 1\d{3}MiB",
    ):
        train(pairs, tmp_path / "tight", replace(options, memory="10kB"), quiet)
    assert not (tmp_path / "tight").exists()


def test_bad_input_is_named_before_any_work(pairs: Path, tmp_path: Path) -> None:
    def refuse(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            train(pairs, tmp_path / "run", replace(FAST, **changes), quiet)
        assert not (tmp_path / "run").exists()

    refuse("class 4 at row .* classes 0 to 1", model=MODEL + "&classes=2")
    refuse(r"does not run on an image of \(4, 32, 32\)", model=MODEL + "&in_channels=3")
    refuse("--crop 30 is not a multiple of the model's total stride 4", crop=30)
    refuse("not a map of their classes", model="torchvision:resnet18?num_classes=5", bands=(1, 2, 3))
    refuse("'lion' is none of sgd", optimizer="lion")
    refuse(r"'0\*dice' is not", loss="cross_entropy+0*dice")
    refuse("for 5 classes", class_weights=(1.0, 2.0))
    refuse("means|mean has 3 values", mean=(1.0, 2.0, 3.0))
    refuse("is not a size", memory="much")


def test_another_run_or_a_strangers_folder_is_left_alone(pairs: Path, tmp_path: Path) -> None:
    options = replace(FAST, epochs=1, steps_per_epoch=1)
    train(pairs, tmp_path / "run", options, quiet)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"another run \(--lr 0.01, not 0.5\); --overwrite replaces it"):
        train(pairs, tmp_path / "run", replace(options, lr=0.5), quiet)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    train(pairs, tmp_path / "run", replace(options, lr=0.5, overwrite=True), quiet)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() != before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="something else than a run"):
            train(pairs, tmp_path / "home", replace(options, overwrite=overwrite), quiet)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_a_diverging_run_says_where_and_keeps_its_checkpoint(pairs: Path, tmp_path: Path) -> None:
    options = replace(FAST, lr=1e30, optimizer="sgd", checkpoint_every=1, epochs=5)
    with pytest.raises(RuntimeError, match=r"step \d+: loss .* row \d+ column \d+; the last checkpoint"):
        train(pairs, tmp_path / "run", options, quiet)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 1
