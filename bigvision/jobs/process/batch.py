"""Many scenes: which they are, where each result goes, and what became of them."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bigvision.jobs.process.options import Options
from bigvision.jobs.process.provenance import TAG, shown_address
from bigvision.routing.record import load_record
from tiling import open_raster
from tiling.addresses import address_name, without_secrets

# What is no path: URLs, GDAL's virtual files, parts of files, a description.
_ADDRESS = re.compile(r"[A-Za-z]\w+:|[\w+.-]+://|/vsi|\s*<")
_SUFFIXES = (".tif", ".tiff", ".vrt", ".zarr", ".jp2", ".img")


def find_scenes(given: Sequence[str], out: Path, options: Options) -> list[tuple[tuple[str, ...], Path]]:
    """Each scene's files and its result's path, for files, globs and directories.

    Of what a glob or directory holds, results of earlier commands are left out where they lie in `out` or
    beside the scene that they were made of.

    ValueError where nothing is found, or two scenes would have one result.
    """
    files = _without_results([found for text in given for found in _expand(text)], out)
    if not files:
        raise ValueError(f"{', '.join(map(without_secrets, given))}: holds results only, and no scene")
    scenes = [tuple(files)] if options.stack else [(path,) for path in files]
    named = [(scene, out / f"{address_name(scene[0])}{options.suffix}") for scene in scenes]
    taken: dict[Path, str] = {}
    for scene, target in named:
        if target in taken:
            one, other = (without_secrets(address) for address in (taken[target], scene[0]))
            raise ValueError(f"{one} and {other} would both become {target}")
        taken[target] = scene[0]
    return named


def _expand(text: str) -> list[tuple[str, bool]]:
    """What a word of the command line stands for; True for what it doesn't name itself."""
    try:
        path, exists = Path(text), Path(text).exists()
    except (OSError, ValueError):
        return [(text, False)]  # no path, or too long for one
    if not exists and _ADDRESS.match(text):
        return [(text, False)]
    if path.is_dir() and not _is_store(path):
        found = sorted(str(entry) for entry in path.iterdir() if entry.suffix.lower() in _SUFFIXES)
        if not found:
            raise ValueError(f"{text}: no raster in this directory ({', '.join(_SUFFIXES)})")
        return [(entry, True) for entry in found]
    if not exists and any(sign in text for sign in "*?["):
        found = sorted(str(entry) for entry in Path(path.anchor or ".").glob(_pattern(path)))
        if not found:
            raise ValueError(f"{text}: matches no file")
        return [(entry, True) for entry in found]
    return [(text, False)]


def _without_results(found: list[tuple[str, bool]], out: Path) -> list[str]:
    stems = Counter(Path(name).parent / Path(name).stem for name, _ in found)
    names = {shown_address(name) for name, _ in found}

    def is_result(path: Path) -> bool:
        """What lies elsewhere under a name of its own is not opened."""
        within = path.parent.resolve() == out.resolve()
        if not (within or stems[path.parent / path.stem] > 1 or path.name.endswith(".route.tif")):
            return False
        try:
            if path.name.endswith(".route.tif"):
                return load_record(path) is not None
            tags = open_raster(path).tags
        except ValueError:
            return False
        return TAG in tags and (within or bool(names & set(json.loads(tags.get("BIGVISION_INPUT", "[]")))))

    return [name for name, expanded in found if not (expanded and is_result(Path(name)))]


def _pattern(path: Path) -> str:
    return str(path.relative_to(path.anchor)) if path.anchor else str(path)


def _is_store(path: Path) -> bool:
    return (path / "zarr.json").exists() or (path / ".zgroup").exists() or (path / ".zarray").exists()
