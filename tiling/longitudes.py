"""Polygons in degrees that cross the antimeridian, on rasters whose longitudes begin anywhere.

RFC 7946 (3.1.9) wants such polygons cut in two at 180 degrees; many aren't. They run from 179 to 181, or jump
from 179 to -179: of an edge's two ways round the Earth the shorter one is meant, and from -180 to 180 all.
"""

from collections.abc import Iterator
from itertools import pairwise

Ring = list[list[float]]
Polygon = list[Ring]

TURN = 360.0


def around(polygons: list[Polygon]) -> Iterator[Polygon]:
    """Each polygon with its longitudes in one piece, and the same a turn to the west and to the east."""
    for polygon in polygons:
        outer = _continuous(polygon[0])
        rings = [outer, *(_beside(_continuous(hole), outer) for hole in polygon[1:])]
        for turns in (0, -1, 1):
            yield [_shifted(ring, turns * TURN) for ring in rings]


def _continuous(ring: Ring) -> Ring:
    """Without jumps of more than half a turn; as it is where that doesn't close it (around a pole)."""
    turns, out = 0, [ring[0]]
    for (x, *_), (following, *rest) in pairwise(ring):
        if TURN / 2 < abs(following - x) < TURN:
            turns += 1 if following < x else -1
        out.append([following + turns * TURN, *rest])
    return out if turns == 0 else ring


def _beside(hole: Ring, outer: Ring) -> Ring:
    """A hole as many turns on as its ring."""
    middle = (min(point[0] for point in outer) + max(point[0] for point in outer)) / 2
    centre = (min(point[0] for point in hole) + max(point[0] for point in hole)) / 2
    return _shifted(hole, round((middle - centre) / TURN) * TURN)


def _shifted(ring: Ring, degrees: float) -> Ring:
    return [[x + degrees, *rest] for x, *rest in ring] if degrees else ring
