"""Units on worker processes: the same pixels, and a worker that dies costs a retry."""

import threading
import time
from pathlib import Path

import psutil
import pytest
from process_scenes import random_pixels, read, write_scene

from bigvision.jobs.process import Options, process_scenes

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


def test_a_scheduler_elsewhere_runs_the_units(tmp_path: Path) -> None:
    from distributed import LocalCluster

    scene = str(write_scene(tmp_path / "scene.tif", random_pixels((3, 100, 120))))
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        chosen = options(scheduler=cluster.scheduler_address)
        assert process_scenes([scene], tmp_path / "cluster", chosen)
    assert process_scenes([scene], tmp_path / "alone", options())
    assert (read(tmp_path / "cluster/scene.tif") == read(tmp_path / "alone/scene.tif")).all()
