"""Starting a training run under torchrun on this machine.

torchrun restarts no dead rank unless told to (`--max-restarts` is 0); here it is told to, and each start goes
on from the last checkpoint. What can be refused is refused before that. The ranks find each other by a file
and speak over loopback: nothing listens to the network.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import psutil

from bigvision.jobs.faces.options import TrainOptions, parse, parser

MODULE = "bigvision.jobs.train_face"
HELP = """\
bigvision face train [--nproc-per-node N] [--max-restarts 3] OPTIONS

Starts torchrun with N ranks on this machine; over several machines, on a network that you trust with your
account and with an --out that all of them share, call torchrun yourself:
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --max-restarts 3 \\
         -m bigvision.jobs.train_face OPTIONS
"""


def launch(arguments: Sequence[str], *, ranks: int, max_restarts: int) -> int:
    """Run torchrun and return its exit status. Ctrl-C or SIGTERM lets the ranks save a checkpoint; a second
    one kills them.

    Raises ValueError for impossible options, data that can't be trained on or a run in the way before a rank
    starts, and with the run's own sentence where it stopped itself.
    """
    if "--help" in arguments or "-h" in arguments:
        print(HELP + "\n" + parser("bigvision face train").format_help())
        return 0
    if ranks < 1 or max_restarts < 0:
        raise ValueError(f"{ranks} ranks, {max_restarts} restarts")
    options = parse(arguments, "bigvision face train")
    _check(options, ranks)
    if options.plan:
        return 0
    meeting = Path(tempfile.mkdtemp(prefix="bigvision-"))
    try:
        status = _run(command(arguments, ranks, max_restarts, meeting), meeting)
        if (why := stopped_because(meeting)) is not None:
            raise ValueError(why)
        return status
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _check(options: TrainOptions, ranks: int) -> None:
    """Refuse what would be refused by every rank; with --plan, show the plan."""
    # These import torch, which --help needn't.
    from bigvision.jobs.faces.checkpoint import candidates
    from bigvision.jobs.faces.preparation import prepare
    from tiling.lock import locked

    prepared = prepare(options, 0, ranks, ranks)
    if options.plan:  # disturbs no run
        print("\n".join(prepared.lines()))
        prepared.plan.check()
        return
    prepared.plan.check()
    with locked(lock_of(options.out), taken(options.out)) if options.out.is_dir() else nullcontext():
        candidates(options.out, options.resume)


def lock_of(out: Path) -> Path:
    """The lock file of a run's folder."""
    return out / ".lock"


def taken(out: Path) -> str:
    """The refusal where another process holds the lock."""
    return f"another process is training in {out}"


def _run(words: list[str], meeting: Path) -> int:
    # A session of its own: Ctrl-C in a terminal reaches this process alone, which then tells the ranks.
    process = subprocess.Popen(words, env=environment(meeting), start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        for rank in _children(process.pid):
            rank.send_signal(signal.SIGTERM)
        if not _children(process.pid):  # no rank yet
            process.terminate()
        process.wait()
        raise
    finally:
        if process.poll() is None:
            left = [*_children(process.pid, recursive=True), psutil.Process(process.pid)]
            for one in left:
                one.kill()
            process.wait()


def _children(pid: int, recursive: bool = False) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive)
    except psutil.NoSuchProcess:
        return []


def environment(meeting: Path) -> dict[str, str]:
    """Variables of the ranks: they meet in a file of `meeting`, torchrun opens no port of its own, and gloo
    and NCCL listen on loopback."""
    from bigvision.jobs.faces.agreement import RENDEZVOUS

    found = dict(os.environ) | {RENDEZVOUS: str(meeting), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        found |= {"GLOO_SOCKET_IFNAME": loopback[0], "NCCL_SOCKET_IFNAME": loopback[0]}
    return found


def command(arguments: Sequence[str], ranks: int, max_restarts: int, meeting: Path) -> list[str]:
    """The command line of torchrun."""
    return [
        *(sys.executable, "-m", "bigvision.jobs.faces.ranks"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", str(meeting / "torchrun")),
        *("--rdzv-conf", "store_type=file", "--rdzv-id", meeting.name, "--nnodes", "1"),
        *("--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts)),
        *("-m", MODULE),
        *arguments,
    ]


def stopped_because(folder: Path) -> str | None:
    """Why the ranks stopped themselves, where they did."""
    try:
        why: str = json.loads((folder / STOPPED).read_text())["why"]
        return why
    except FileNotFoundError:
        return None


STOPPED = "stopped.json"
