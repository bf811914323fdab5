"""One rank of four: runs the same scenarios in groups of 4, 1, 3 and 2 ranks and leaves what came out in
files.

Started by the fixture `outcomes` in conftest.py as `python rank_worker.py RANK FOLDER`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import heads
from heads import SGD, Adam, Margin, RowwiseAdagrad, ShardedMarginHead

SIZES = (4, 1, 3, 2)
DIM, BATCH, STEPS = 6, 9, 4
# Where the batch is cut: unequal shares, and one that is empty.
CUTS = {1: (0, 9), 2: (0, 7, 9), 3: (0, 4, 4, 9), 4: (0, 1, 5, 5, 9)}

DENSE = SGD(0.2, momentum=0.9, weight_decay=5e-2, inactive="dense")
TRAININGS: dict[str, dict[str, Any]] = {
    "exact": {"num_classes": 37, "optimizer": SGD(0.1, momentum=0.9, weight_decay=5e-4)},
    "five classes": {"num_classes": 5, "optimizer": SGD(0.1)},
    "large scale": {"num_classes": 37, "optimizer": SGD(0.001), "scale": 900.0},
    "plain softmax": {"num_classes": 23, "optimizer": SGD(0.1), "normalized": False, "scale": 1.0},
    "sampled": {"num_classes": 61, "optimizer": DENSE, "active": heads.sampled(0.3, run=2, unbiased=True)},
    "adagrad": {"num_classes": 37, "optimizer": RowwiseAdagrad(0.1), "active": heads.sampled(0.3)},
    "adam": {"num_classes": 37, "optimizer": Adam(0.01), "active": heads.hashed(3, 4)},
    "clustered": {
        "num_classes": 61,
        "optimizer": SGD(0.1),
        "active": heads.clustered(9, 1, epsilon=0.4, refresh=2, iterations=2),
    },
    "adaptive": {"num_classes": 37, "optimizer": SGD(0.1), "margin": heads.MagFace(1.0, 12.0)},
    "float32": {"num_classes": 37, "optimizer": SGD(0.1, 0.9), "storage": "float32"},
    "bfloat16": {"num_classes": 37, "optimizer": SGD(0.1, 0.9), "storage": "bfloat16"},
}
RESUMED = ("exact", "sampled", "adam", "clustered")


def make(name: str, **changes: Any) -> ShardedMarginHead:
    settings = {"margin": Margin(1.2, 0.3, 0.1), "scale": 16.0, "storage": "float64", "tile": 7}
    if name == "plain softmax":
        settings["margin"] = Margin()
    return ShardedMarginHead(dim=DIM, **(settings | TRAININGS[name] | changes))


def batch(step: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = 3 * torch.randn(BATCH, DIM, dtype=torch.float64, generator=generator)
    return x, torch.randint(-1, classes, (BATCH,), generator=generator)


def train(head: ShardedMarginHead, first: int, last: int, cuts: tuple[int, ...]) -> dict[str, Any]:
    rank, losses, gradients = head.ranks.rank, [], []
    for step in range(first, last):
        x, y = batch(step, head.num_classes)
        mine = slice(cuts[rank], cuts[rank + 1])
        x = x[mine].clone().requires_grad_()
        loss = head(x, y[mine])
        loss.backward()
        losses.append(loss.item())
        gradients.append(x.grad / head.ranks.size)
    return {"losses": losses, "gradients": gradients, "centres": head.full_centers()}


def message(act: Callable[[], Any]) -> str:
    try:
        act()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def complaints(size: int, rank: int, folder: Path) -> dict[str, str]:
    """What each rank says to input that is bad on the last rank only."""
    head, last = make("exact"), rank == size - 1
    x, y = torch.randn(3, DIM), torch.tensor([1, -1, 5])
    nan = torch.where(torch.arange(3)[:, None] == 2, torch.nan, x)
    good = head.full_centers()
    found = {
        "label": message(lambda: head(x, torch.tensor([1, 37, 5]) if last else y)),
        "negative": message(lambda: head(x, torch.tensor([1, 3, -2]) if last else y)),
        "width": message(lambda: head(x[:, :5] if last else x, y)),
        "finite": message(lambda: head(nan if last else x, y)),
        "kind": message(lambda: head(x, y.int() if last else y)),
        "count": message(lambda: head(x, y[:2] if last else y)),
        "seed": message(lambda: make("exact", seed=int(last))),
        "ranks": message(lambda: make("exact", num_classes=max(size - 1, 1))),
        "margin": message(lambda: heads.load_head(make("exact", margin=Margin()), folder / "exact")),
        "dim": message(lambda: heads.load_head(make("exact", num_classes=36), folder / "exact")),
        "place": message(
            lambda: make("exact", place=folder / "exact" / "head.json" / "rows" if last else "device")
        ),
        "absent": message(lambda: heads.load_head(head, folder / "nowhere")),
        "state": message(lambda: head.state_dict() if size > 1 else None),
        "load": message(lambda: head.load_state_dict({}) if size > 1 else None),
        "unwritable": message(lambda: heads.save_head(head, folder / "exact" / "head.json" / "x")),
    }
    assert torch.equal(head.full_centers(), good)  # nothing moved, and nothing hangs afterwards
    return found


def edited(cuts: tuple[int, ...]) -> dict[str, Any]:
    head = make("adam", active=None)
    train(head, 0, 2, cuts)
    before = head.full_centers()
    more = heads.add_identities(head, 4)
    fewer = heads.remove_identities(head, [0, 36, 17], active=heads.sampled(0.5))
    merged = heads.merge_identities(head, [[3, 30], [8, 2, 20]])
    return {
        "before": before,
        "more": more.full_centers(),
        "fewer": fewer.full_centers(),
        "merged": merged.full_centers(),
        "losses": [train(h, 2, 3, cuts)["losses"][0] for h in (more, fewer, merged)],
    }


def skipping(cuts: tuple[int, ...]) -> dict[str, Any]:
    """A non-finite incoming gradient on the last rank, and one that an fp16 scaler has multiplied."""
    head = make("exact")
    rank, size = head.ranks.rank, head.ranks.size
    before = head.full_centers()
    x, y = batch(0, 37)
    mine = slice(cuts[rank], cuts[rank + 1])
    x = x[mine].clone().requires_grad_()
    head(x, y[mine]).backward(torch.tensor(torch.inf if rank == size - 1 else 1.0, dtype=torch.float64))
    skipped = torch.equal(before, head.full_centers()) and head.skipped == 1 and bool(x.grad.isnan().all())
    head.unscale = lambda: 1024.0
    scaled = x.detach().clone().requires_grad_()
    (head(scaled, y[mine]) * 1024.0).backward()
    return {"skipped": skipped, "centres": head.full_centers(), "gradient": scaled.grad / size / 1024.0}


def run(rank: int, size: int, folder: Path) -> dict[str, Any]:
    cuts = CUTS[size]
    out: dict[str, Any] = {name: train(make(name), 0, STEPS, cuts) for name in TRAININGS}
    for name in RESUMED:
        head = make(name)
        if size == 4:
            train(head, 0, STEPS // 2, cuts)
            heads.save_head(head, folder / name)
        else:
            heads.load_head(head, folder / name)
        out[f"resumed {name}"] = train(head, STEPS // 2, STEPS, cuts)
    out["complaints"] = complaints(size, rank, folder)
    out["edited"] = edited(cuts)
    out["skipping"] = skipping(cuts)
    return out


def main() -> None:
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    for size in SIZES:
        if rank >= size:
            continue
        dist.init_process_group("gloo", f"file://{folder}/meet-{size}", rank=rank, world_size=size)
        torch.save(run(rank, size, folder), folder / f"out-{size}-{rank}.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
