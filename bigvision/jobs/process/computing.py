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
        return self.plan.grid(self.scene.shape, self.writer)

    @cached_property
    def store(self) -> PhaseStore:
        """The sums of all bands."""
        return PhaseStore(self.ledger.sums, len(self.units))

    def left(self) -> list[Tile]:
        """The units that aren't done."""
        done = self.ledger.done()
        return [unit for unit in self.units if unit.index not in done]

    def to_sum(self) -> list[list[Tile]]:
        """The bands whose sums are missing, by phase; none where no unit needs them any more."""
        if not self.left():
            return [[] for _ in range(self.plan.phases or 0)]
        summed = [self.store.done(phase) for phase in range(self.plan.phases or 0)]
        return [[band for band in self.units if band.index not in done] for done in summed]

    def pixels_left(self) -> int:
        """To be stored, where a pixel counts in equal parts for each pass over it."""
        left, to_sum = self.left(), self.to_sum()
        missing = sum(_pixels(units) for units in (*to_sum, left)) - stored_pixels(self.ledger, left)
        return missing // (1 + len(to_sum))

    @property
    def pixels(self) -> int:
        """Of the whole work, likewise."""
        return _pixels(self.units)

    def run(self, work: Work, client: "Client | None", computed: Callable[[float], object]) -> None:
        """Compute what is left; `computed` is told of pixels as `pixels_left` counts them.

        Raises:
            Interrupted: at the user's wish; what is stored by then stays.
        """
        remote = client is not None
        try:
            to_sum = self.to_sum()

            def progress(more: float) -> None:
                computed(more / (1 + len(to_sum)))

            for phase, bands in enumerate(to_sum):
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
