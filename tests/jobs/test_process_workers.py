"""Units on worker processes: the same pixels, and a worker that dies costs a retry."""

import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
from process_scenes import random_pixels, read, write_scene

from bigvision.jobs.process import Options, process_scenes
from bigvision.jobs.process.cluster import open_client

NETWORKS = Path(__file__).with_name("process_networks.py")


def options(**more: object) -> Options:
    return Options(model=f"{NETWORKS}:random_net?seed=6", tile=32, dtype="float32", **more)  # type: ignore[arg-type]


def kill_a_worker_after(units: int, ledger: Path, killed: list[int]) -> None:
    """Kill the first worker process of ours once so many units are done."""
    while not (ledger / "done").is_dir() or len(list((ledger / "done").iterdir())) < units:
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if "spawn_main" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)
            return


@pytest.mark.slow
def test_a_dying_worker_costs_a_retry_and_not_the_job(tmp_path: Path) -> None:
    scene = str(write_scene(tmp_path / "scene.tif", random_pixels((3, 700, 700))))
    killed: list[int] = []
    ledger = tmp_path / "workers" / ".scene.tif.run"
    killer = threading.Thread(target=kill_a_worker_after, args=(20, ledger, killed), daemon=True)
    killer.start()
    assert process_scenes([scene], tmp_path / "workers", options(workers=2))
    assert killed
    assert process_scenes([scene], tmp_path / "alone", options())
    assert (read(tmp_path / "workers/scene.tif") == read(tmp_path / "alone/scene.tif")).all()


def test_nobody_else_can_talk_to_workers_started_here() -> None:
    """What listens while workers run asks for a key that only this job has, and serves no pages."""
    with open_client(options(workers=1)) as client:
        assert client is not None and client.submit(sum, [1, 2]).result() == 3
        here = psutil.Process()
        open_ports = {
            place.laddr.port: place.laddr.ip
            for process in (here, *here.children(recursive=True))
            for place in process.net_connections("tcp")
            if place.status == psutil.CONN_LISTEN
        }
        assert open_ports and set(open_ports.values()) == {"127.0.0.1"}
        answers = {port: ask(port) for port in open_ports}
    for port, answer in answers.items():
        assert port != 8787
        assert answer == b"" or b"404" in answer.splitlines()[0], (port, answer[:80])


def ask(port: int) -> bytes:
    """What a port says to a stranger who asks for a page in the clear."""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as stranger:
        stranger.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        try:
            return stranger.recv(4096)
        except (ConnectionResetError, TimeoutError):
            return b""


def test_a_scheduler_elsewhere_runs_the_units(tmp_path: Path) -> None:
    from distributed import LocalCluster

    scene = str(write_scene(tmp_path / "scene.tif", random_pixels((3, 100, 120))))
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        chosen = options(scheduler=cluster.scheduler_address)
        assert process_scenes([scene], tmp_path / "cluster", chosen)
    assert process_scenes([scene], tmp_path / "alone", options())
    assert (read(tmp_path / "cluster/scene.tif") == read(tmp_path / "alone/scene.tif")).all()
