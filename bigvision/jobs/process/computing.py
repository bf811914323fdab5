"""What is left of one scene, and its computation, here or on a cluster, until it is stored.

Legend: C bands, H and W rows and columns of the scene.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from bigvision.jobs.process.following import followed, stored_pixels
from bigvision.jobs.process.ledger import Ledger
from bigvision.jobs.process.phases import PhasedEngine, PhaseRunner, PhaseStore
from bigvision.jobs.process.planning import Plan
from bigvision.jobs.process.scene import Scene
from bigvision.jobs.process.units import UnitRunner, Unread, Work
from tiling import Tile, ZarrWriter
from tiling.mapping import map_tiles

if TYPE_CHECKING:
    from distributed import Client


class Interrupted(KeyboardInterrupt):
    """The user ended a computation, of which the part `kept` (0 to 1) is stored."""

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.kept = kept


@dataclass(frozen=True)
class Computation:
    """The units of one scene and, where its network takes statistics of it, the bands that are summed."""

    scene: Scene
    plan: Plan
    writer: ZarrWriter
    ledger: Ledger

    @cached_property
    def units(self) -> Sequence[Tile]:
        """What is computed, stored and marked one by one."""
        return self.plan.units(self.scene.shape, self.scene.frame, self.writer)

    @cached_property
    def bands(self) -> Sequence[Tile]:
        """What passes for statistics sum: of the whole scene, whatever is written."""
        return self.plan.bands(self.scene.shape, self.writer) if self.plan.phases else ()

    @cached_property
    def store(self) -> PhaseStore:
        """The sums of all bands."""
        return PhaseStore(self.ledger.sums, len(self.bands))

    def left(self) -> list[Tile]:
        """The units that aren't done."""
        done = self.ledger.done()
        return [unit for unit in self.units if unit.index not in done]

    def to_sum(self) -> list[list[Tile]]:
        """The bands whose sums are missing, by phase; none where no unit needs them any more."""
        if not self.left():
            return [[] for _ in range(self.plan.phases or 0)]
        summed = [self.store.done(phase) for phase in range(self.plan.phases or 0)]
        return [[band for band in self.bands if band.index not in done] for done in summed]

    def pixels_left(self) -> int:
        """Of the result, to be computed: all passes together are worth its pixels."""
        left, to_sum = self.left(), self.to_sum()
        missing = sum(_pixels(units) for units in (*to_sum, left)) - stored_pixels(self.ledger, left)
        return int(missing * self._worth)

    @property
    def pixels(self) -> int:
        """Of the result."""
        return _pixels(self.units)

    @property
    def copied_pixels(self) -> int:
        """Of the result, taken from an earlier one."""
        copied = self.ledger.copied()
        return _pixels([unit for unit in self.units if unit.index in copied])

    @cached_property
    def _worth(self) -> float:
        """Of a pixel in one pass."""
        return self.pixels / ((self.plan.phases or 0) * _pixels(self.bands) + self.pixels)

    def run(self, work: Work, client: "Client | None", computed: Callable[[float], object]) -> None:
        """Compute what is left; `computed` is told of pixels as `pixels_left` counts them.

        Raises:
            Interrupted: at the user's wish; what is stored by then stays.
        """
        remote = client is not None
        try:

            def progress(more: float) -> None:
                computed(more * self._worth)

            for phase, bands in enumerate(self.to_sum()):
                assert isinstance(work.engine, PhasedEngine)
                summed = partial(_summed, self.store, phase, bands)
                with followed(progress, remote=remote, stored=summed) as tell:
                    sums = PhaseRunner(work, work.engine, phase, tell)
                    map_tiles(sums, Unread(), None, bands, client=client, workers=1)
                work.engine.forget(work.spec, work.scene, phase)
            left = self.left()
            with followed(progress, remote=remote, stored=partial(stored_pixels, self.ledger, left)) as tell:
                runner = UnitRunner(work, tell)
                map_tiles(runner, Unread(), None, left, client=client, workers=work.engine.at_once)
        except KeyboardInterrupt as stop:
            raise Interrupted(1 - self.pixels_left() / max(self.pixels, 1)) from stop


def _summed(store: PhaseStore, phase: int, bands: Sequence[Tile]) -> int:
    done = store.done(phase)
    return _pixels([band for band in bands if band.index in done])


def _pixels(units: Sequence[Tile]) -> int:
    return sum(unit.core.height * unit.core.width for unit in units)
