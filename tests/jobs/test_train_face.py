"""Training faces: runs on one and several ranks, their continuation, and what stops them."""

import csv
import io
import os
import pickle
import resource
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from face_runs import arguments, curve, losses, run
from PIL import Image
from safetensors.torch import load_file

from bigvision.jobs import train_face
from bigvision.jobs.faces import checkpoint
from datasets.recordio import ImageRecord, RecordWriter, pack_image_record

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps on two ranks with statistics over all ranks; checkpoints at 4 and 8."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(2, out, batch_norm="global", evaluate="synthetic:10x4@6:10", keep="9") == ["", ""]
    return out


def continued(finished: Path, out: Path, world: int) -> list[str]:
    """The run as it was after step 4, gone on with."""
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    return run(world, out, batch_norm="global", evaluate="synthetic:10x4@6:10", keep="9", resume="auto")


def test_a_run_leaves_its_record(finished: Path) -> None:
    assert [row["step"] for row in curve(finished)] == list(range(1, 9))
    assert all(row["samples_per_second"] > 0 and row["memory_mib"] > 50 for row in curve(finished))
    assert [row["lr"] for row in curve(finished)] == pytest.approx(
        [0.02 * (1 - s / 8) ** 2 for s in range(8)]
    )
    assert losses(finished)[-1] < losses(finished)[0]
    names = {entry.name for entry in finished.iterdir()}
    assert names >= {"backbone.safetensors", "curve.csv", "curves.png", "evaluations.csv", "options.json"}
    assert not [name for name in names if "partial" in name]
    with (finished / "evaluations.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4", "8"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_continued_run_has_the_curve_of_an_uninterrupted_one(
    finished: Path, tmp_path: Path, world: int
) -> None:
    out = tmp_path / "run"
    assert continued(finished, out, world) == [""] * world
    exact = world == 2
    assert losses(out) == (losses(finished) if exact else pytest.approx(losses(finished), rel=1e-3))
    ours, theirs = (load_file(path / "backbone.safetensors") for path in (out, finished))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-3)


def test_a_run_on_one_rank_is_the_run_on_two(finished: Path, tmp_path: Path) -> None:
    assert run(1, tmp_path, batch_norm="global", epochs="1", schedule="constant") == [""]
    assert losses(tmp_path)[:1] == pytest.approx(losses(finished)[:1], rel=1e-4)


def test_a_run_that_exists_is_not_overwritten(finished: Path) -> None:
    options = (finished / "options.json").read_text()
    (message,) = run(1, finished, seed="5")
    assert "holds a run up to step-00000008: --resume auto" in message
    assert (finished / "options.json").read_text() == options


def test_two_runs_are_not_mixed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "run" / "checkpoints")
    (message,) = run(1, tmp_path / "run", resume=str(finished / "checkpoints" / "step-00000004"))
    assert "holds a run up to step-00000008: choose another --out" in message


def test_a_run_from_a_chosen_checkpoint_is_restarted_from_its_own_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other checkpoints refuse a start, but a restart by torchrun made them itself."""
    out, chosen = tmp_path / "run", str(tmp_path / "other" / "step-00000005")
    monkeypatch.setattr(checkpoint, "read_position", lambda path: None)
    # One that died before the first was saved.
    assert checkpoint.candidates(out, chosen, restarted=True) == [Path(chosen)]
    own = out / "checkpoints" / "step-00000009"
    own.mkdir(parents=True)
    (own.parent / "step-00000003").mkdir()
    assert checkpoint.candidates(out, chosen, restarted=True)[0] == own
    with pytest.raises(ValueError, match="choose another --out"):
        checkpoint.candidates(out, chosen)


def test_a_process_killed_while_saving_loses_nothing(tmp_path: Path) -> None:
    def kill_at_the_second(rank: int) -> None:
        original, count = checkpoint._save_backbone, iter(range(9))

        def save(folder: Path, *rest: Any) -> None:
            original(folder, *rest)
            if next(count) == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._save_backbone = save  # in the forked process only

    assert run(1, tmp_path / "run", kill_at_the_second) == ["killed"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000004"
    ]
    assert run(1, tmp_path / "run", resume="auto") == [""]
    assert run(1, tmp_path / "whole") == [""]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
    ]


def test_a_full_disk_stops_every_rank_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    assert run(2, tmp_path, epochs="1") == ["", ""]
    kept = checkpoint.checkpoints(tmp_path / "checkpoints")

    def small_files(rank: int) -> None:
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))

    answers = run(2, tmp_path, small_files, resume="auto", changed="epochs")
    assert all("saving" in answer and "rank 0" in answer for answer in answers), answers
    assert checkpoint.checkpoints(tmp_path / "checkpoints") == kept


def test_a_loss_that_is_not_finite_stops_with_step_rank_and_rate(tmp_path: Path) -> None:
    answers = run(2, tmp_path, lr="1e30", clip="0", save_every="1", schedule="constant")
    for rank, answer in enumerate(answers):
        assert f"step 2, rank {rank}, learning rate 1e+30" in answer
        assert "not finite" in answer or "nan" in answer
    kept = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert kept
    assert "step" in (tmp_path / "stopped.json").read_text()


def test_a_refused_run_that_torchrun_restarts_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "stopped.json").write_text('{"why": "step 7: the loss is nan"}')

    def restarted(rank: int) -> None:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"

    (message,) = run(1, tmp_path, restarted)
    assert "step 7: the loss is nan" in message


@pytest.mark.slow
def test_a_restarted_run_goes_on_by_itself(tmp_path: Path) -> None:
    assert run(1, tmp_path, epochs="1") == [""]

    def restarted(rank: int) -> None:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"

    assert run(1, tmp_path, restarted) == [""]
    assert [row["step"] for row in curve(tmp_path)] == list(range(1, 9))


def faces(folder: Path, identities: int, each: int) -> Path:
    for identity in range(identities):
        (folder / f"p{identity}").mkdir(parents=True)
        for number in range(each):
            Image.new("L", (16, 16), 20 * identity + number).save(folder / f"p{identity}" / f"{number}.pgm")
    return folder


def truncated(folder: Path) -> Path:
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("L", (16, 16), 3).save(buffer, "PNG")
    with RecordWriter(folder / "a.rec") as writer:
        for key in range(30):
            writer.write(key, pack_image_record(ImageRecord((float(key % 5),), key, buffer.getvalue())))
    (folder / "a.rec").write_bytes((folder / "a.rec").read_bytes()[:-20])
    return folder / "a.rec"


def gaps(path: Path) -> Path:
    """Thirty people with labels of some other database."""
    with tarfile.open(path, "w") as shard:
        for key in range(30):
            picture = io.BytesIO()
            Image.new("L", (16, 16), key).save(picture, "PNG")
            for name, data in ((f"{key}.png", picture.getvalue()), (f"{key}.cls", b"%d" % (250 * key))):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": "3"}, r"--classes 3, but .* has 6 identities"),
        ({"classes": "many"}, "--classes many is neither auto nor a number"),
        ({"data": "tar:{gaps}"}, r"a\.tar/29\.png has label 7250, but only 30 of 7251 .*@dense numbers them"),
        ({"data": "{one}"}, "did you mean folder:"),
        ({"data": "folder:{empty}"}, "is empty: no image"),
        ({"data": "folder:{one}"}, "at least two identities; the data has 1"),
        ({"data": "rec:{truncated}"}, "is truncated: a.idx lists 30 records"),
        ({"data": "synthetic:2x20@0:1"}, "at least two identities; the data has 1"),
        ({"batch-size": "50"}, "a batch of 50 is more than the 48 images"),
        ({"memory": "1MiB"}, "need about .* and 1 MiB are available"),
        ({"resume": "{absent}"}, "is no checkpoint of a training run"),
        ({"evaluate": "bin:{absent}"}, "No such file"),
        ({"evaluate": "synthetic:9x1"}, "--evaluate synthetic:9x1: verification needs .* 1 images at most"),
        ({"evaluate": "synthetic:9x9@3:4"}, "verification needs two identities"),
        ({"evaluate": "bin:{genuine}"}, "12 pairs, 12 of them genuine, cannot be verified"),
        ({"backbone": "resnet"}, "backbone 'resnet' is none of iresnet18"),
    ],
)
def test_bad_input_is_refused_by_every_rank(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "one": faces(tmp_path / "one", 1, 20)}
    places |= {"genuine": tmp_path / "genuine.bin"}
    places["genuine"].write_bytes(pickle.dumps(([b"image"] * 24, [True] * 12)))
    places |= {"gaps": gaps(tmp_path / "a.tar")}
    places |= {"absent": tmp_path / "absent", "truncated": truncated(tmp_path / "rec")}
    filled = {name: value.format(**places) for name, value in changed.items()}
    answers = run(2, tmp_path / "run", **filled)
    for answer in answers:
        with pytest.raises(ValueError, match=message):
            raise ValueError(answer)


def test_more_ranks_than_classes_are_refused(tmp_path: Path) -> None:
    answers = run(3, tmp_path, data="synthetic:2x20")
    assert all("2 classes cannot be shared by 3 ranks" in answer for answer in answers), answers


def test_a_checkpoint_of_another_run_is_refused(finished: Path, tmp_path: Path) -> None:
    resume = str(finished / "checkpoints" / "step-00000004")
    answers = run(2, tmp_path, resume=resume, dim="16", margin="1,0,0.4", data="synthetic:7x8")
    for message in ("dim was 8 and is 16", "margin was '1,0.5,0' and is '1,0,0.4'", "classes was 6 and is 7"):
        assert all(message in answer for answer in answers), answers


def test_a_rank_that_fails_alone_stops_the_others(tmp_path: Path) -> None:
    def break_reading(rank: int) -> None:
        if rank == 1:
            from datasets.identities import SyntheticIdentities

            def fail(self: Any, index: int) -> None:
                raise OSError("the network drive is gone")

            SyntheticIdentities.read = fail  # type: ignore[method-assign, assignment]  # forked process only

    answers = run(2, tmp_path, break_reading)
    assert all("rank 1" in answer and "the network drive is gone" in answer for answer in answers), answers
    assert not (tmp_path / "stopped.json").exists()  # it may be back when torchrun starts the ranks again


def test_damaged_records_are_counted_and_named(tmp_path: Path) -> None:
    data = faces(tmp_path / "data", 4, 8)
    (data / "p2" / "3.pgm").write_bytes(b"no image")
    assert run(2, tmp_path / "run", data=f"folder:{data}", epochs="1", batch_size="16") == ["", ""]
    assert (tmp_path / "run" / "damaged.txt").read_text().startswith("p2/3.pgm: ")
    assert curve(tmp_path / "run")[-1]["damaged"] == 1


@pytest.mark.parametrize("good", [0, 20])
def test_a_drive_that_went_away_stops_the_run(tmp_path: Path, good: int) -> None:
    """All of the images, or more than the allowed share of them."""
    data = faces(tmp_path / "data", 4, 10)
    for path in sorted(data.rglob("*.pgm"))[good:]:
        path.write_bytes(b"")
    answers = run(2, tmp_path / "run", data=f"folder:{data}", max_damaged="0.4", save_every="50")
    for answer in answers:
        assert "images are damaged, more than --max-damaged 0.4 allows; one of them: p" in answer
    assert not (tmp_path / "run" / "backbone.safetensors").exists()


def test_a_damaged_name_that_is_no_text_does_not_stop_the_run(tmp_path: Path) -> None:
    data = faces(tmp_path / "data", 4, 8)
    (data / "p2" / os.fsdecode(b"\xff.pgm")).write_bytes(b"no image")
    assert run(1, tmp_path / "run", data=f"folder:{data}", epochs="2", batch_size="16") == [""]
    assert r"p2/\udcff.pgm: " in (tmp_path / "run" / "damaged.txt").read_text()


@pytest.mark.parametrize(
    "changed",
    [
        {"active": "sampled:0.5:unbiased", "storage": "bfloat16", "head-optimizer": "adagrad"},
        pytest.param(
            {"active": "clustered:3:1", "margin": "adaface", "head-optimizer": "adam"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"active": "hashed:4:2", "margin": "magface", "schedule": "cosine", "warmup": "0.5"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"place": "{centres}", "dtype": "bfloat16", "accumulate": "2", "augment": "light"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"dtype": "float16", "clip": "0", "schedule": "constant"}, marks=pytest.mark.slow),
    ],
)
def test_every_way_to_train_trains(tmp_path: Path, changed: dict[str, str]) -> None:
    filled = {name: value.format(centres=tmp_path / "centres") for name, value in changed.items()}
    assert run(2, tmp_path / "run", epochs="1", **filled) == ["", ""]
    assert all(loss == loss for loss in losses(tmp_path / "run"))


def test_a_plan_trains_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_face.main([*arguments(tmp_path), "--plan"])
    assert "6 classes, 8 steps, 4 an epoch" in capfd.readouterr().out
    assert not (tmp_path / "checkpoints").exists()
