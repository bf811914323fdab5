"""What exact, sampled and clustered steps of the sharded head learn from the same data in as many steps.

    python benchmarks/heads_learning.py --picture curves.png

A small network and a head of 100 000 classes learn noisy prototypes. Samples are of 2 000 of the classes, the
others are there to be confused with; loss is the full softmax of held-out samples, rank-1 their nearest among
all centres. It shows that the gates train, not how a face model would.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Run as a script, this file's folder comes first on the path and heads.py there would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent.resolve()]

from heads import Margin, RowwiseAdagrad, ShardedMarginHead, clustered, sampled  # noqa: E402
from heads.gates import GateInput, GateSpec  # noqa: E402


def learning(picture: Path | None, classes: int, steps: int) -> None:
    people, dim, noise = 2000, 64, 0.5
    prototypes = F.normalize(torch.randn(people, dim, generator=torch.Generator().manual_seed(1)))
    who = torch.arange(people) * (classes // people)

    def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        person = torch.randint(0, people, (count,), generator=generator)
        spread = F.normalize(torch.randn(count, dim, generator=generator))
        return prototypes[person] + noise * spread, who[person]

    gates = {
        "exact": None,
        "sampled 0.1": sampled(0.1),
        "sampled 0.1, logQ": sampled(0.1, unbiased=True),
        "clustered": clustered(2000, 1, refresh=max(steps // 3, 1), iterations=2),
    }
    curves = {}
    print(f"{classes:,} classes, {steps} steps of 256 samples")
    titles = ("cpu s/step", "training loss", "full loss", "rank-1", "classes a step")
    print(f"{'':20s}" + "".join(f"{title:>16s}" for title in titles))
    for name, gate in gates.items():
        curves[name] = _learn(name, gate, samples, classes, dim, steps)
    if picture is not None:
        _draw(curves, picture)


def _learn(
    name: str,
    gate: GateSpec | None,
    samples: Callable[[int, int], tuple[Tensor, Tensor]],
    classes: int,
    dim: int,
    steps: int,
) -> list[tuple[int, float]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(dim, 256), nn.PReLU(), nn.Linear(256, dim))
    head = ShardedMarginHead(
        classes,
        dim,
        Margin(1.0, 0.2, 0.0),
        32.0,
        active=gate,
        storage="bfloat16",
        optimizer=RowwiseAdagrad(0.1),
        init_std=0.1,
        compiled=True,
    )
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    held, held_labels = samples(1000, 10**6)
    curve, busy = [], 0.0
    for step in range(steps):
        x, y = samples(256, step)
        started = time.process_time()
        optimizer.zero_grad()
        loss = head(network(x), y)
        loss.backward()
        optimizer.step()
        busy += (time.process_time() - started) * (step >= 5)  # the first ones compile
        if step % max(steps // 10, 1) == 0 or step == steps - 1:
            with torch.no_grad():
                curve.append((step + 1, float(head.eval()(network(held), held_labels))))
            head.train()
    rank_1 = first_rank(network, head, held, held_labels)
    with torch.no_grad():
        share = active_share(head, F.normalize(network(x)), y)
    print(
        f"{name:20s}{busy / max(steps - 5, 1):16.3f}{float(loss.detach()):16.3f}{curve[-1][1]:16.3f}"
        f"{rank_1:16.3f}{share:16.1%}",
        flush=True,
    )
    return curve


@torch.no_grad()
def first_rank(network: nn.Module, head: ShardedMarginHead, x: Tensor, labels: Tensor) -> float:
    """The share of samples whose own centre is the nearest of all."""
    unit, centres = F.normalize(network(x)), F.normalize(head.full_centers().float())
    nearest = torch.cat([(part @ centres.t()).argmax(1) for part in unit.split(64)])
    return float((nearest == labels).float().mean())


def active_share(head: ShardedMarginHead, unit: Tensor, labels: Tensor) -> float:
    """The share of the classes that the gate opens for a batch."""
    if head.gate is None:
        return 1.0
    rows = head.gate.select(GateInput(unit, labels, head.shard.own_rows(labels), head.step)).rows
    return 1.0 if rows is None else len(rows) / head.num_classes


def _draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name)
    axes.set(xlabel="step", ylabel="full softmax loss of held-out samples", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--picture", type=Path, help="where to draw the curves (PNG)")
    options = parser.parse_args()
    learning(options.picture, options.classes, options.steps)


if __name__ == "__main__":
    main()
