"""Runs of the face job on forked ranks, for the tests of its continuation and of what stops it."""

import csv
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

from bigvision.jobs import train_face

SMALL = {
    "data": "synthetic:6x8",
    "backbone": "mobilefacenet",
    "image-size": "16",
    "dim": "8",
    "batch-size": "12",
    "epochs": "2",
    "lr": "0.02",
    "workers": "0",
    "log-every": "1",
    "save-every": "4",
    "memory": "40GiB",
}


def arguments(out: Path, **changed: str) -> list[str]:
    options = SMALL | {"out": str(out)} | {name.replace("_", "-"): value for name, value in changed.items()}
    return [part for name, value in options.items() for part in (f"--{name}", *value.split(" "))]


def run(world: int, out: Path, before: Callable[[int], Any] | None = None, **changed: str) -> list[str]:
    """Run the job on some ranks; returns what each rank ended with ("" is well)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for module in {__name__, *([] if before is None else [before.__module__])}:
        cloudpickle.register_pickle_by_value(sys.modules[module])
    launcher().send_bytes(cloudpickle.dumps(partial(run_forked, world, out, port, before, changed)))
    answers: list[str] = launcher().recv()
    return answers


LAUNCHER = """
import sys
from multiprocessing.connection import Connection
import cloudpickle
calls = Connection(int(sys.argv[1]))
try:
    while True:
        calls.send(cloudpickle.loads(calls.recv_bytes())())
except EOFError:
    pass
"""


@cache
def launcher() -> Connection:
    """To the process that forks the ranks: this one has used autograd's threads, which no fork survives."""
    here, there = multiprocessing.Pipe()
    command = [sys.executable, "-c", LAUNCHER, str(there.fileno())]
    subprocess.Popen(command, stdout=subprocess.DEVNULL, pass_fds=[there.fileno()])
    there.close()
    return here


def run_forked(
    world: int, out: Path, port: int, before: Callable[[int], Any] | None, changed: dict[str, str]
) -> list[str]:
    """The ranks' answers."""
    import matplotlib.figure  # noqa: F401  what a run imports late, once for all ranks
    import torch._dynamo
    import torch.utils.tensorboard

    context = multiprocessing.get_context("fork")
    answers = [context.SimpleQueue() for _ in range(world)]

    def rank_main(rank: int) -> None:
        torch.set_num_threads(1)
        numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            if before is not None:
                before(rank)
            train_face.main(arguments(out, **changed))
            answers[rank].put("")
        except SystemExit as end:
            answers[rank].put(str(end.code))
        except BaseException:
            answers[rank].put(traceback.format_exc())

    ranks = [context.Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    hung = [process.pid for process in ranks if process.is_alive()]
    for process in ranks:
        process.kill()
    ends = ["killed" if queue.empty() else queue.get() for queue in answers]
    return ["a rank hangs"] if hung else ends


def curve(out: Path) -> list[dict[str, float]]:
    with (out / "curve.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in curve(out)]
