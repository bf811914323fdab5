"""What a face run goes on from: a sound checkpoint of the same data and settings."""

import os
import shutil
from pathlib import Path

import pytest
from face_runs import curve, losses, run
from PIL import Image

from bigvision.jobs.faces.checkpoint import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    for identity in range(4):
        (folder / f"p{identity}").mkdir()
        for number in range(6):
            Image.new("L", (16, 16), 20 * identity + number).save(folder / f"p{identity}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, people: Path) -> Path:
    """Four steps, a checkpoint each."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(1, out, data=f"folder:{people}", save_every="1", keep="9") == [""]
    return out


def gone_on(finished: Path, out: Path, data: object, **changed: str) -> str:
    """What a run ends with that goes on after step 2 with other data or settings."""
    shutil.copytree(finished, out)
    for later in checkpoints(out / "checkpoints")[2:]:
        shutil.rmtree(later)
    (answer,) = run(1, out, data=f"folder:{data}", resume="auto", save_every="1", keep="9", **changed)
    return answer


def test_a_renamed_identity_is_refused(finished: Path, people: Path, tmp_path: Path) -> None:
    """Its folder comes last: all labels behind it are others."""
    shutil.copytree(people, tmp_path / "data")
    (tmp_path / "data" / "p0").rename(tmp_path / "data" / "p9")
    message = "the identities of the data (their names, numbers or order) are others"
    assert message in gone_on(finished, tmp_path / "run", tmp_path / "data")
    allowed = gone_on(finished, tmp_path / "again", tmp_path / "data", changed="images identities")
    assert message in allowed


def test_more_images_are_gone_on_with_on_an_explicit_word(
    finished: Path, people: Path, tmp_path: Path
) -> None:
    shutil.copytree(people, tmp_path / "data")
    shutil.copy(people / "p1" / "0.png", tmp_path / "data" / "p1" / "9.png")
    refused = gone_on(finished, tmp_path / "run", tmp_path / "data")
    assert "images were 24 and are 25 (--changed images goes on with what is new)" in refused
    assert gone_on(finished, tmp_path / "again", tmp_path / "data", changed="images") == ""
    assert [row["step"] for row in curve(tmp_path / "again")] == [1, 2, 3, 4]


def test_images_moved_between_identities_are_seen(finished: Path, people: Path, tmp_path: Path) -> None:
    shutil.copytree(people, tmp_path / "data")
    (tmp_path / "data" / "p1" / "0.png").rename(tmp_path / "data" / "p2" / "0a.png")
    assert "images were 24 and are 24 with other labels" in gone_on(
        finished, tmp_path / "run", tmp_path / "data"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": "3"}, "epochs was 2.0 and is 3.0 (--changed epochs goes on"),
        (
            {"lr": "0.5", "augment": "light"},
            "lr was 0.02 and is 0.5; augment was 'flip' and is 'light' (--changed lr",
        ),
        ({"active": "sampled:0.5"}, "active was 'all' and is 'sampled:0.5'"),
        ({"seed": "3", "lr": "0.5"}, "seed was 0 and is 3; lr was 0.02 and is 0.5"),
    ],
)
def test_other_settings_are_refused_by_name(
    finished: Path, people: Path, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    assert message in gone_on(finished, tmp_path / "run", people, **changed)


def test_other_settings_are_gone_on_with_on_an_explicit_word(
    finished: Path, people: Path, tmp_path: Path
) -> None:
    assert gone_on(finished, tmp_path / "run", people, epochs="3", lr="0.5", changed="lr epochs") == ""
    assert [row["step"] for row in curve(tmp_path / "run")] == list(range(1, 7))


def damaged(path: Path, how: str) -> None:
    victim = max(path.rglob("*.*"), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
    elif how == "cut":
        victim.write_bytes(data[:-100])
    else:
        victim.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over(finished: Path, people: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    damaged(out / "checkpoints" / "step-00000004", how)
    assert run(1, out, data=f"folder:{people}", resume="auto", save_every="1", keep="9") == [""]
    assert losses(out) == losses(finished)
    assert (out / "checkpoints" / "set-aside-0-step-00000004").is_dir()


def test_damage_on_one_ranks_part_is_known_to_all(finished: Path, people: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for path in checkpoints(out / "checkpoints"):
        damaged(path, "flipped")
    answers = run(2, out, data=f"folder:{people}", resume="auto")
    assert all("step-00000001 is damaged: " in answer for answer in answers), answers
    answers = run(2, out, data=f"folder:{people}", resume=str(out / "checkpoints" / "step-00000003"))
    assert all("step-00000003 is damaged: " in answer for answer in answers), answers
    assert len(checkpoints(out / "checkpoints")) == 4


def test_an_older_checkpoint_can_be_gone_on_from(finished: Path, people: Path, tmp_path: Path) -> None:
    """The later ones stay, under other names."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for _ in range(2):
        chosen = str(out / "checkpoints" / "step-00000002")
        assert run(1, out, data=f"folder:{people}", resume=chosen, save_every="1", keep="9") == [""]
        assert losses(out) == losses(finished)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == [
        *(f"set-aside-{n}-step-0000000{step}" for n in range(2) for step in (3, 4)),
        *(f"step-0000000{step}" for step in range(1, 5)),
    ]


def test_ranks_that_write_to_different_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines without a shared disk."""
    base = tmp_path

    def elsewhere(rank: int) -> None:
        (base / str(rank)).mkdir()
        os.chdir(base / str(rank))
        from bigvision.jobs.faces import integrity

        integrity.PATIENCE = 0.1

    answers = run(2, Path("run"), elsewhere)
    assert all(
        "rank 1" in answer and "--out must be one folder that all ranks share" in answer for answer in answers
    )
