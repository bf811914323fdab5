"""The sharded head against a plain one, and at ten and twenty-nine million classes: gloo, 1 thread a rank.

    python benchmarks/heads.py                 200 000 classes: plain fp32 head, ours in float32 and bfloat16
    python benchmarks/heads.py --peer FOLDER   and the partial_fc_v2.py of InsightFace in that folder
    python benchmarks/heads.py --large         10 000 000 classes: exact and sampled steps, and bare GEMMs
    python benchmarks/heads.py --mmap FOLDER   29 000 000 classes in files there (30 GB), sampled

Every row is its own set of processes, so that peaks don't mix. Times are medians; the GEMM time is measured
in the same processes on the same centres: the four products of a step (8*B*C*D operations), nothing around
them. "cpu" is the processor time of the slowest rank, which has one thread: what the step would take on a
machine with nothing else to do. "above torch" is a rank's peak without what torch takes in any process that
trains.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

# Run as a script, this file's folder comes first on the path and the file would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent.resolve()]

from heads import SGD, Margin, RowwiseAdagrad, ShardedMarginHead, sampled  # noqa: E402


@dataclass(frozen=True)
class Case:
    name: str
    kind: str  # "plain" | "peer" | "ours"
    classes: int
    batch: int  # of one rank
    rate: float | None = None
    storage: str = "float32"
    rule: str = "sgd"
    place: str = "device"
    run: int = 1
    steps: int = 5
    gemms: bool = False
    warm: bool = False  # compile on a small head, and count the first step of the big one
    dim: int = 512
    ranks: int = 2


class PlainHead(nn.Module):
    """A class-sharded ArcFace head as one would write it: logits, softmax and gradients as whole fp32
    matrices.
    """

    def __init__(self, classes: int, dim: int, rate: float | None) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local, self.rate = classes // self.size, rate
        self.weight = nn.Parameter(torch.randn(self.local, dim) * 0.01)

    def forward_backward(self, x: Tensor, labels: Tensor) -> float:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        label_parts = [torch.empty_like(labels) for _ in range(self.size)]
        dist.all_gather(parts, x.detach())
        dist.all_gather(label_parts, labels)
        features = torch.cat(parts).requires_grad_()
        y = torch.cat(label_parts) - self.rank * self.local
        held = (y >= 0) & (y < self.local)
        weight, y = self._choose(y, held)
        cosine = (F.normalize(features) @ F.normalize(weight).t()).clamp(-1, 1)
        rows = held.nonzero()[:, 0]
        target = torch.cos(torch.acos(cosine[rows, y[rows]]) + 0.5)
        logits = cosine.index_put((rows, y[rows]), target) * 64.0
        p = logits.detach().clone()
        largest = p.amax(1, keepdim=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        p.sub_(largest).exp_()
        total = p.sum(1, keepdim=True)
        dist.all_reduce(total)
        p.div_(total)
        own = torch.zeros(len(p))
        own[rows] = p[rows, y[rows]]
        dist.all_reduce(own)
        p[rows, y[rows]] -= 1.0
        logits.backward(p / len(p))
        dist.all_reduce(features.grad)
        return float(-own.clamp_min(1e-30).log().mean())

    def _choose(self, y: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        if self.rate is None:
            return self.weight, y
        scores = torch.rand(self.local)
        scores[y[held]] = 2.0
        index = scores.topk(int(self.rate * self.local)).indices.sort().values
        return self.weight[index], torch.where(held, torch.searchsorted(index, y), y)


def plain_step(case: Case) -> Callable[[Tensor, Tensor], float]:
    head = PlainHead(case.classes, case.dim, case.rate)
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = head.forward_backward(x, y)
        optimizer.step()
        return loss

    return step


def peer_step(case: Case) -> Callable[[Tensor, Tensor], float]:
    from partial_fc_v2 import PartialFC_V2  # the user's copy, put on sys.path

    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]

    def arcface(cosine: Tensor, labels: Tensor) -> Tensor:
        rows = torch.where(labels.view(-1) != -1)[0]
        target = cosine[rows, labels.view(-1)[rows]]
        with torch.no_grad():
            moved = torch.cos(torch.acos(target) + 0.5)
            cosine.data[rows, labels.view(-1)[rows]] = moved
        return cosine * 64.0

    head = PartialFC_V2(arcface, case.dim, case.classes, case.rate or 1.0)
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = head(x, y.clone())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def our_head(case: Case) -> ShardedMarginHead:
    momentum = SGD(0.1, momentum=0.9, weight_decay=5e-4)
    return ShardedMarginHead(
        case.classes,
        case.dim,
        Margin(1.0, 0.5, 0.0),
        64.0,
        active=None if case.rate is None else sampled(case.rate, run=case.run),
        storage=case.storage,
        place=case.place,
        optimizer={"sgd": momentum, "plain sgd": SGD(0.1), "adagrad": RowwiseAdagrad(0.1)}[case.rule],
        compiled=True,
    )


def gemm_seconds(head: ShardedMarginHead, batch: int) -> float:
    """The four products of an exact step over this rank's centres, tile by tile.

    Where the processor only emulates bfloat16 they are float32, of tiles that are widened first.
    """
    shard = head.shard
    dtype = shard.multiply
    u = torch.randn(batch, head.dim).to(dtype)
    z = torch.empty(shard.tile, batch, dtype=dtype)
    d_w = torch.empty(shard.tile, head.dim, dtype=dtype)
    d_u = torch.empty(batch, head.dim, dtype=dtype)
    started = time.perf_counter()
    for low in range(0, len(shard.classes), shard.tile):
        rows = slice(low, min(low + shard.tile, len(shard.classes)))
        w = shard.store.load(rows, ("weight",))["weight"].to(dtype)
        part = z[: len(w)]
        torch.mm(w, u.t(), out=part)
        torch.mm(w, u.t(), out=part)
        torch.mm(part, u, out=d_w[: len(w)])
        torch.mm(part.t(), w, out=d_u)
    return time.perf_counter() - started


def worker(rank: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=case.ranks)
    # What torch takes in any process that trains: itself, the machinery of its optimisers, a GEMM library.
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    torch.mm(torch.zeros(64, 64).bfloat16(), torch.zeros(64, 64).bfloat16())
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    if case.warm:
        small = replace(case, classes=30_000, place="device")
        our_step(our_head(small))(
            torch.randn(case.batch, case.dim).requires_grad_(), torch.arange(case.batch)
        )
        started = time.perf_counter()
    head = our_head(case) if case.kind == "ours" else None
    result: dict[str, Any] = {"start": time.perf_counter() - started}
    step = our_step(head) if head else {"plain": plain_step, "peer": peer_step}[case.kind](case)
    result |= timed_steps(case, rank, step)
    if case.gemms and head is not None:
        dist.barrier()
        worked = time.process_time()
        result["gemms"] = gemm_seconds(head, case.batch * case.ranks)
        result["gemms cpu"] = time.process_time() - worked
    result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result["above"] = result["peak"] - imports
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def timed_steps(case: Case, rank: int, step: Callable[[Tensor, Tensor], float]) -> dict[str, float]:
    """Medians over the steps, without the first one where it is the one that compiles."""
    generator = torch.Generator().manual_seed(rank)
    times, busy, loss = [], [], 0.0
    for number in range(case.steps + (not case.warm)):
        x = torch.randn(case.batch, case.dim, generator=generator).requires_grad_()
        y = torch.randint(0, case.classes, (case.batch,), generator=generator)
        dist.barrier()
        started, worked = time.perf_counter(), time.process_time()
        loss = step(x, y)
        busy.append(time.process_time() - worked)
        dist.barrier()
        times.append(time.perf_counter() - started)
        if rank == 0:
            text = f"  {case.name}: step {number} {times[-1]:.2f} s, cpu {busy[-1]:.2f} s"
            print(text, file=sys.stderr, flush=True)
    timed = slice(not case.warm, None)
    return {"loss": loss, "step": statistics.median(times[timed]), "cpu": statistics.median(busy[timed])}


def our_step(head: ShardedMarginHead) -> Callable[[Tensor, Tensor], float]:
    def step(x: Tensor, y: Tensor) -> float:
        loss = head(x, y)
        loss.backward()
        return float(loss.detach())

    return step


def measure(case: Case) -> dict[str, float]:
    """The slowest rank's times and the sum of the ranks' peaks (GiB)."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (case, folder), nprocs=case.ranks)
        ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(case.ranks)]
    out = {key: max(r[key] for r in ranks) for key in ranks[0]}
    return out | {key: sum(r[key] for r in ranks) for key in ("peak", "above")}


def compare(peer: Path | None) -> None:
    c, b = 200_000, 64
    for rate in (None, 0.1):
        label = "full" if rate is None else f"sampled {rate}"
        cases = [Case(f"plain fp32 head, {label}", "plain", c, b, rate)]
        if peer is not None:
            sys.path.insert(0, str(peer))
            os.environ["PYTHONPATH"] = f"{peer}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            cases.append(Case(f"partial_fc_v2, {label}", "peer", c, b, rate))
        cases += [
            Case(f"ours float32, {label}", "ours", c, b, rate, "float32"),
            Case(f"ours bfloat16, {label}", "ours", c, b, rate, "bfloat16"),
        ]
        base: dict[str, float] = {}
        for case in cases:
            found = measure(case)
            base = base or found
            print(_row(case, found, base), flush=True)


def _row(case: Case, found: dict[str, float], base: dict[str, float]) -> str:
    step, cpu, peak, above = (found[key] for key in ("step", "cpu", "peak", "above"))
    return (
        f"{case.name:30s} {step:7.3f} s/step {case.ranks * case.batch / step:6.0f} samples/s "
        f"x{base['step'] / step:5.1f}  cpu {cpu:6.3f} s x{base['cpu'] / cpu:5.1f}  "
        f"peak {peak / 2:5.2f} GiB a rank ({peak / base['peak']:.2f} of it), above torch "
        f"{above / 2:5.2f} ({above / base['above']:.2f})  loss {found['loss']:.2f}"
    )


def large(classes: int, steps: int) -> None:
    exact: dict[str, float] = {}
    for name, rate, rule in (("exact", None, "adagrad"), ("sampled 0.1", 0.1, "adagrad")):
        case = Case(
            name, "ours", classes, 128, rate, "bfloat16", rule, steps=steps, gemms=rate is None, warm=True
        )
        found = measure(case)
        exact = exact or found
        flops = 8 * 256 * classes * 512
        faster = exact["step"] / found["step"], exact["cpu"] / found["cpu"]
        tail = f"{faster[0]:.1f} times faster than exact, {faster[1]:.1f} in cpu time"
        if case.gemms:
            bare, bare_cpu = found["gemms"], found["gemms cpu"]
            tail = (
                f"bare GEMMs {bare:.2f} s, cpu {bare_cpu:.2f} s "
                f"({flops / case.ranks / bare_cpu / 1e9:.0f} GFLOP/s a core); "
                f"step / GEMMs = {found['step'] / bare:.2f}, in cpu time {found['cpu'] / bare_cpu:.2f}"
            )
        print(
            f"{classes:,} classes, {name}: {found['step']:.2f} s/step, cpu {found['cpu']:.2f} s "
            f"(centres made in {found['start']:.1f} s), peak {found['peak']:.2f} GiB for both ranks; {tail}",
            flush=True,
        )


def mapped(classes: int, folder: Path, steps: int) -> None:
    place = folder / "centres"
    case = Case(
        "mmap", "ours", classes, 128, 0.1, "bfloat16", "adagrad", str(place), run=64, steps=steps, warm=True
    )
    try:
        found = measure(case)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(
        f"{classes:,} classes in {classes * 1024 / 1e9:.1f} GB of memory-mapped files, sampled 0.1 in runs "
        f"of {case.run}: "
        f"{found['step']:.2f} s/step, cpu {found['cpu']:.2f} s (files made in {found['start']:.0f} s), "
        f"peak resident {found['peak']:.2f} GiB for both ranks, loss {found['loss']:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, help="folder with InsightFace's partial_fc_v2.py")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--mmap", type=Path, metavar="FOLDER")
    parser.add_argument("--classes", type=int, help="instead of 10 or 29 million")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of --large and --mmap (2)")
    options = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    if options.large:
        large(options.classes or 10_000_000, options.steps)
    elif options.mmap:
        mapped(options.classes or 29_000_000, options.mmap, options.steps)
    else:
        compare(options.peer)


if __name__ == "__main__":
    main()
