"""Many scenes: which they are, where each result goes, and what became of them."""

from collections.abc import Sequence
from pathlib import Path

from bigvision.jobs.process.options import Options

_SUFFIXES = (".tif", ".tiff", ".vrt", ".zarr", ".jp2", ".img")


def find_scenes(given: Sequence[str], out: Path, options: Options) -> list[tuple[tuple[str, ...], Path]]:
    """Each scene's files and its result's path, for files, globs and directories.

    ValueError where nothing is found, or two scenes would have one result.
    """
    files = [path for text in given for path in _expand(text)]
    scenes = [tuple(files)] if options.stack else [(path,) for path in files]
    named = [(scene, out / f"{Path(scene[0]).stem}{options.suffix}") for scene in scenes]
    taken: dict[Path, str] = {}
    for scene, target in named:
        if target in taken:
            raise ValueError(f"{taken[target]} and {scene[0]} would both become {target}")
        taken[target] = scene[0]
    return named


def _expand(text: str) -> list[str]:
    path = Path(text)
    if "://" in text or text.startswith("/vsi"):
        return [text]
    if path.is_dir() and not _is_store(path):
        found = sorted(str(entry) for entry in path.iterdir() if entry.suffix.lower() in _SUFFIXES)
        if not found:
            raise ValueError(f"{text}: no raster in this directory ({', '.join(_SUFFIXES)})")
        return found
    if not path.exists() and any(sign in text for sign in "*?["):
        found = sorted(str(entry) for entry in Path(path.anchor or ".").glob(_pattern(path)))
        if not found:
            raise ValueError(f"{text}: matches no file")
        return found
    return [text]


def _pattern(path: Path) -> str:
    return str(path.relative_to(path.anchor)) if path.anchor else str(path)


def _is_store(path: Path) -> bool:
    return (path / "zarr.json").exists() or (path / ".zgroup").exists() or (path / ".zarray").exists()
