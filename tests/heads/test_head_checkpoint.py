"""A checkpoint is whole or not there, and what was there stays until the new one is."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bigvision.ranks import Ranks
from heads import (
    SGD,
    AdaFace,
    CheckpointError,
    Margin,
    ShardedMarginHead,
    checkpoint,
    clustered,
    load_head,
    save_head,
)
from heads.safetensors_storage import StreamedWriter
from heads.state import row_tensors

SAVER = """
import sys, torch
from heads import SGD, Margin, ShardedMarginHead, save_head
head = ShardedMarginHead(60_000, 64, Margin(), optimizer=SGD(0.1), storage="float32")
while True:
    save_head(head, sys.argv[1])
    head.step += 1
    print(head.step, flush=True)
"""


def make(**settings: object) -> ShardedMarginHead:
    return ShardedMarginHead(40, 6, **({"optimizer": SGD(0.1, 0.9), "margin": Margin()} | settings))


def train(head: ShardedMarginHead, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 6, generator=generator).requires_grad_()
    loss = head(x, torch.randint(0, 40, (5,), generator=generator))
    loss.backward()
    return loss.item()


def test_everything_comes_back(tmp_path: Path) -> None:
    head = make(margin=AdaFace(momentum=0.5), storage="bfloat16")
    for step in range(3):
        train(head, step)
    head.lr = 0.03
    save_head(head, tmp_path / "head")
    other = make(margin=AdaFace(momentum=0.5), storage="bfloat16")
    load_head(other, tmp_path / "head")
    assert (other.step, other.lr, float(other.margin.mean)) == (3, 0.03, float(head.margin.mean))
    assert [train(head, s) for s in (3, 4)] == [train(other, s) for s in (3, 4)]
    assert torch.equal(head.full_centers(), other.full_centers())
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.metadata"))


@pytest.mark.parametrize("settings", [{"place": "host"}, {"place": "folder"}, {"active": clustered(4)}, {}])
def test_what_is_loaded_reaches_the_centres_wherever_they_are(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`DTensor.from_local` copies a tensor that is not on its mesh's device: a checkpoint would be read into
    the copy. Here "meta" stands for the GPU, with the centres of a host or a folder left on the CPU.
    """
    if settings.get("place") == "folder":
        settings = {"place": tmp_path / "rows"}
    head = make(**settings)
    rows = row_tensors(head)
    where = {
        name: tensor if name in head.shard.store.names and "place" in settings else tensor.to("meta")
        for name, tensor in rows.items()
    }

    class Mesh:
        def __init__(self, kind: str, shape: tuple[int, ...]) -> None:
            self.kind = kind
            assert shape == (2,)

    def from_local(local: torch.Tensor, mesh: Mesh, *_: object, **__: object) -> torch.Tensor:
        return local if local.device.type == mesh.kind else local.to(mesh.kind)

    monkeypatch.setattr(checkpoint, "init_device_mesh", Mesh)
    monkeypatch.setattr(checkpoint, "row_tensors", lambda _: where)
    monkeypatch.setattr(checkpoint.DTensor, "from_local", from_local)
    head.ranks = Ranks(0, 2)
    state = checkpoint._state(head)
    assert all(state[name] is tensor for name, tensor in where.items())


def test_a_failed_save_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, folder = make(), tmp_path / "head"
    save_head(head, folder)
    train(head, 0)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StreamedWriter, "write_data", full_disk)
        with pytest.raises(CheckpointError, match=r"saving .*No space left on device"):
            save_head(head, folder)
    other = make()
    load_head(other, folder)
    assert other.step == 0
    save_head(head, folder)
    load_head(other, folder)
    assert other.step == 1 and [p.name for p in tmp_path.iterdir()] == ["head"]


def test_killed_while_saving_nothing_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "head"
    command = [sys.executable, "-c", SAVER, str(folder)]
    saver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert saver.stdout is not None
    for _ in range(3):
        saver.stdout.readline()
    time.sleep(0.01)
    saver.send_signal(signal.SIGKILL)
    saver.wait()
    head = ShardedMarginHead(60_000, 64, Margin(), optimizer=SGD(0.1), storage="float32")
    load_head(head, folder)
    assert head.step >= 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"storage": "float64"}, "storage is 'float32' there and 'float64' here"),
        ({"optimizer": SGD(0.1)}, "columns is"),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"scale": 32.0}, "scale is 64.0 there and 32.0 here"),
    ],
)
def test_a_checkpoint_of_another_head_is_refused(tmp_path: Path, settings: dict, words: str) -> None:
    save_head(make(), tmp_path / "head")
    with pytest.raises(CheckpointError, match=words):
        load_head(make(**settings), tmp_path / "head")


def test_a_checkpoint_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    save_head(make(), tmp_path / "head")
    (tmp_path / "head" / "shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="loading"):
        load_head(make(), tmp_path / "head")
