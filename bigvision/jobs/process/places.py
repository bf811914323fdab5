"""What a command reads and where it writes: a result takes the place of nothing but a result."""

import os
from collections.abc import Sequence
from pathlib import Path

from bigvision.jobs.process.ledger import ledger_folder
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.previous import earlier_result
from bigvision.jobs.process.provenance import TAG, Provenance
from bigvision.jobs.process.route_state import picture_file, record_file
from bigvision.models.spec import parse_spec
from bigvision.routing.record import load_record
from bigvision.routing.route_file import load_route
from tiling import RasterError, open_raster
from tiling.behind import behind, check_apart, check_file
from tiling.replaceable import check_alone, not_a_store


def check_places(paths: Sequence[str], target: Path, options: Options) -> None:
    """ValueError where making `target` would take the place of what it is made from, or of another's file."""
    check_apart(places_written(target, options), places_read(paths, target, options))
    if os.path.lexists(target):
        fingerprint_at(target)
    elif target.suffix != ".zarr":
        check_alone(target)
    if options.route is not None:
        check_record(target)


def check_batch(found: Sequence[tuple[tuple[str, ...], Path]], options: Options, report: Path | None) -> None:
    """ValueError where a result of one scene, or the report, would take the place of what another reads.

    What stands nowhere yet takes no place; what is wrong with a scene is told when its turn comes.
    """
    written = [(place, target) for _, target in found for place in places_written(target, options)]
    written = [(place, target) for place, target in written if options.overwrite and os.path.lexists(place)]
    if report is None and not written:
        return
    for paths, own in found:
        try:
            read = places_read(paths, own, options)
        except (ValueError, OSError):
            continue
        check_apart([place for place, target in written if target != own], read)
        if report is not None:
            check_apart([report], read)
            if any(place.absolute() == report.absolute() for place in places_written(own, options)):
                raise ValueError(f"{report}: is where the result of a scene goes; choose another --json")


def places_written(target: Path, options: Options) -> list[Path]:
    """Every file and folder that a command makes of one scene."""
    routed = [record_file(target), picture_file(target)] if options.route is not None else []
    return [target, ledger_folder(target), *routed]


def places_read(paths: Sequence[str], target: Path, options: Options) -> list[Path]:
    """Every file and folder that a result is made from, all the way down; RasterError at a pipe."""
    files = [options.weights, options.aoi, options.route, *_code(options.model)]
    if options.route is not None:
        check_file(options.route)
        route = load_route(options.route)
        files += [route.weights, route.gate_weights, *_code(route.model)]
    scenes = [place for path in paths for place in behind(path).places]
    if options.previous is not None:
        scenes += behind(earlier_result(options.previous, target)).places
    named = [file for file in files if file is not None]
    for file in named:
        check_file(file)
    return [*scenes, *named]


def fingerprint_at(target: Path) -> str:
    """Of the result that stands at `target`; ValueError where something else does, which must stay."""
    try:
        found = open_raster(target).tags.get(TAG)
    except RasterError:
        found = None
    if not found or (target.is_dir() and not_a_store(target) is not None):
        raise ValueError(
            f"{target}: exists and was not made by bigvision process, so it stays; choose another --out, or "
            "move it away"
        )
    return found


def is_ours(target: Path, origin: Provenance, options: Options) -> bool:
    """Whether `target` is this very command's result; ValueError where it is another's and must stay."""
    if fingerprint_at(target) == origin.fingerprint:
        return True
    if options.overwrite:
        return False
    if origin.unknown:
        raise ValueError(
            f"{target}: exists, and whether its input changed since can't be known ({origin.unknown[0]}); "
            "--overwrite makes it anew"
        )
    raise ValueError(
        f"{target}: exists and was made by another command, input or model; --overwrite replaces it"
    )


def check_record(target: Path) -> None:
    """ValueError where something else than the record of an earlier route, and its picture, stands there."""
    record, picture = record_file(target), picture_file(target)
    stranger = picture if os.path.lexists(picture) else None
    if os.path.lexists(record):
        try:
            load_record(record)
            stranger = None
        except ValueError:
            stranger = record
    if stranger is not None:
        raise ValueError(
            f"{stranger}: exists and belongs to no route, so it stays; choose another --out, or move it away"
        )


def _code(model: str) -> list[Path]:
    spec = parse_spec(model)
    return [Path(spec.source)] if spec.is_file else []
