"""Whether a folder that all ranks write to is whole: every rank sees every file, with the bytes written.

Sizes and SHA-256 digests of all files stand in `digests.json` beside them. The ranks share the reading.
"""

import hashlib
import json
import os
import socket
import time
import uuid
from pathlib import Path

from bigvision.jobs.faces.agreement import World

FILE = "digests.json"
PATIENCE = 10.0  # seconds until a network file system shows what another machine wrote


def check_shared(folder: Path, world: World) -> None:
    """`FaceJobError` on every rank where `folder` is another one for some rank than for rank 0."""
    token = folder / f".{world.gather(uuid.uuid4().hex)[0]}"
    with world.together("opening the run"):
        if world.leads:
            token.touch()
    try:
        with world.together("opening the run"):
            if not _appears(token):
                raise ValueError(
                    f"{folder.absolute()} on {socket.gethostname()} is not the folder that rank 0 writes to: "
                    "--out must be one folder that all ranks share"
                )
    finally:
        if world.leads:
            token.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def write_digests(folder: Path, world: World) -> None:
    """Write the digests of all files in `folder`; `FaceJobError` where the ranks don't see the same ones."""
    with world.together(f"looking through {folder}"):
        files = _files(folder)
    seen = world.gather([(str(name), (folder / name).stat().st_size) for name in files])
    with world.together(f"looking through {folder}"):
        others = [rank for rank, found in enumerate(seen) if found != seen[0]]
        if others:
            raise ValueError(
                f"rank {others[0]} sees {len(seen[others[0]])} files where rank 0 sees {len(seen[0])}: --out "
                "must be one folder that all ranks share"
            )
        mine = {str(name): _digest(folder / name) for name in files[world.rank :: world.size]}
    digests = {name: digest for part in world.gather(mine) for name, digest in part.items()}
    with world.together(f"looking through {folder}"):
        if world.leads:
            with (folder / FILE).open("w") as file:
                json.dump(digests, file, indent=1)
                file.flush()
                os.fsync(file.fileno())


def damage(folder: Path, world: World) -> str:
    """What is wrong with a folder, "" where every file is as it was written; all ranks get one answer."""
    found = world.gather(_damage(folder, world))
    return next(filter(None, found), "")


def _damage(folder: Path, world: World) -> str:
    try:
        digests = json.loads((folder / FILE).read_text())
        names = sorted(digests)
        for name in names[world.rank :: world.size]:
            size, digest = digests[name]
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes and not {size}"
            if _digest(folder / name) != [size, digest]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _files(folder: Path) -> list[Path]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != Path(FILE))


def _digest(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
