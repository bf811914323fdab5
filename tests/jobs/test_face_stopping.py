"""`bigvision face train` that is told to stop, killed, or loses a process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from face_runs import arguments, curve, losses, run

from bigvision.jobs.faces import checkpoint

BIGVISION = Path(sys.executable).with_name("bigvision")
pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def training(
    out: Path, *words: str, log: str = "log", ranks: int = 2, **changed: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A run of some hundred steps in processes of its own, its output in a file beside `out`."""
    options = arguments(out, **({"epochs": "200", "save_every": "3", "keep": "99"} | changed))
    command = [BIGVISION, "face", "train", "--nproc-per-node", str(ranks), *words, *options]
    with out.with_name(log).open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        for one in [*descendants(process.pid), *family]:
            if one.is_running():
                one.kill()
        process.wait()


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ranks_of(pid: int) -> list[psutil.Process]:
    return [p for p in descendants(pid) if "bigvision.jobs.train_face" in p.cmdline()]


def wait_for_a_checkpoint(process: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + 300
    while not checkpoint.checkpoints(out / "checkpoints"):
        assert process.poll() is None, out.with_name("log").read_text()
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


def test_told_to_stop_it_saves_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with training(out) as process:
        wait_for_a_checkpoint(process, out)
        family = descendants(process.pid)
        sockets = [found for p in family for found in p.net_connections("inet")]
        listening = [found.laddr.ip for found in sockets if found.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1", "::1"}
        with training(out, log="second") as second:
            assert second.wait(120) == 1
        assert (tmp_path / "second").read_text() == f"bigvision: another process is training in {out}\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    log, last = (tmp_path / "log").read_text(), int(curve(out)[-1]["step"])
    assert f"told to stop: step {last} is saved" in log and "Traceback" not in log
    assert checkpoint.checkpoints(out / "checkpoints")[-1].name == f"step-{last:08d}"
    more = str((last + 1) / 4)
    assert run(1, out, epochs=more, resume="auto", changed="epochs") == [""]
    assert [row["step"] for row in curve(out)] == list(range(1, last + 2))


@pytest.mark.slow
def test_its_ranks_end_with_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with training(out) as process:
        wait_for_a_checkpoint(process, out)
        family = descendants(process.pid)
        process.kill()
        _, alive = psutil.wait_procs(family, 120)
        assert not alive
    assert "told to stop" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "decoder"])
def test_a_lost_process_is_replaced_and_the_run_goes_on(tmp_path: Path, victim: str) -> None:
    out = tmp_path / "run"
    with training(out, "--max-restarts", "2", epochs="12", workers="1") as process:
        wait_for_a_checkpoint(process, out)
        rank = ranks_of(process.pid)[-1]
        (rank if victim == "rank" else rank.children()[-1]).kill()
        assert process.wait(500) == 0, (tmp_path / "log").read_text()[-3000:]
    assert [row["step"] for row in curve(out)] == list(range(1, 49))
    assert "going on from step" in (tmp_path / "log").read_text()
    assert run(2, tmp_path / "whole", epochs="12") == ["", ""]
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.slow
def test_a_run_that_stops_itself_ends_with_its_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with training(out, ranks=1, lr="1e30", clip="0", schedule="constant") as process:
        assert process.wait(120) == 1
    lines = (tmp_path / "log").read_text().splitlines()
    (sentence,) = [line for line in lines if line.startswith("bigvision: ")]
    assert "learning rate 1e+30" in sentence and lines[-1] == sentence
    assert not any("Traceback" in line for line in lines)
