"""Selected regions become few large rectangles: a deep network's halo costs more than a small interior.

Legend: R, C rows and columns of regions.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigvision.routing.boxes import Box

Price = Callable[[Box], float]
_PAIRED_UP_TO = 96  # rectangles: beyond that, comparing all pairs takes longer than it saves


@dataclass(frozen=True)
class Rectangle:
    """Regions computed together: `box` is computed, of which `cells` (disjoint boxes) are kept."""

    box: Box
    cells: tuple[Box, ...]


def merge(mask: NDArray[np.bool_], price: Price, limit: int) -> list[Rectangle]:
    """Cover the selected regions by rectangles at the least price found.

    Runs of rows and of columns are joined where they match; then rectangles are joined to the box around
    both, unselected regions included, while that is cheaper than computing both with their own halos.

    Args:
        mask: [R, C], the selected regions.
        price: what computing a box of regions costs with its halo, in any unit.
        limit: most regions in a rectangle (memory), at least 1.

    Returns:
        Rectangles whose cells partition the selection; in row-major order.
    """
    if limit < 1:
        raise ValueError(f"a rectangle holds at least 1 region, got a limit of {limit}")
    turned = [Box(b.left, b.top, b.right, b.bottom) for b in _by_rows(mask.T, limit)]
    best = min((_by_rows(mask, limit), turned), key=lambda boxes: sum(map(price, boxes)))
    joined = _joined([Rectangle(box, (box,)) for box in best], price, limit)
    # Never dearer than regions one by one, whatever the price.
    kept = [part for one in joined for part in _worth_it(one, price)]
    return sorted(kept, key=lambda one: one.box)


def singles(mask: NDArray[np.bool_]) -> list[Rectangle]:
    """Every selected region by itself, row by row: shapes that don't depend on what else is selected."""
    boxes = [Box(int(r), int(c), int(r) + 1, int(c) + 1) for r, c in zip(*mask.nonzero(), strict=True)]
    return [Rectangle(box, (box,)) for box in boxes]


def _by_rows(mask: NDArray[np.bool_], limit: int) -> list[Box]:
    """Runs of selected regions in a row, joined with equal runs below, of at most `limit` regions."""
    open_runs: dict[tuple[int, int], int] = {}
    boxes: list[Box] = []
    for row in range(mask.shape[0] + 1):
        runs = set(_runs(mask[row], limit)) if row < mask.shape[0] else set()
        for run in [*open_runs]:
            full = (row - open_runs[run] + 1) * (run[1] - run[0]) > limit
            if run not in runs or full:
                boxes.append(Box(open_runs.pop(run), run[0], row, run[1]))
        for run in sorted(runs):
            open_runs.setdefault(run, row)
    return boxes


def _runs(line: NDArray[np.bool_], limit: int) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], line.view(np.int8), [0]))))
    found: list[tuple[int, int]] = []
    # Long runs are cut to squares' sides, so that rectangles grow downwards too.
    side = max(int(limit**0.5), 1)
    for start, stop in edges.reshape(-1, 2).tolist():
        found += [(at, min(at + side, stop)) for at in range(start, stop, side)]
    return found


def _joined(rectangles: list[Rectangle], price: Price, limit: int) -> list[Rectangle]:
    """Greedy: the pair whose common box saves most, again and again."""
    if len(rectangles) > _PAIRED_UP_TO:
        return rectangles
    prices = {one: price(one.box) for one in rectangles}

    def saving(pair: tuple[Rectangle, Rectangle]) -> float:
        box = pair[0].box.around(pair[1].box)
        return -1.0 if box.area > limit else prices[pair[0]] + prices[pair[1]] - price(box)

    savings: dict[Any, float] = {pair: saving(pair) for pair in itertools.combinations(rectangles, 2)}
    while savings:
        pair = max(savings, key=savings.__getitem__)
        if savings[pair] <= 0:
            break
        one = Rectangle(pair[0].box.around(pair[1].box), pair[0].cells + pair[1].cells)
        savings = {p: s for p, s in savings.items() if not {*p} & {*pair}}
        for old in pair:
            del prices[old]
        others = list(prices)
        prices[one] = price(one.box)
        savings |= {(other, one): saving((other, one)) for other in others}
    return list(prices)


def _worth_it(one: Rectangle, price: Price) -> list[Rectangle]:
    cells = [Box(r, c, r + 1, c + 1) for box in one.cells for r, c in _cells(box)]
    if len(cells) == 1 or price(one.box) <= sum(map(price, cells)):
        return [one]
    return [Rectangle(cell, (cell,)) for cell in cells]


def _cells(box: Box) -> Iterator[tuple[int, int]]:
    return itertools.product(range(box.top, box.bottom), range(box.left, box.right))
