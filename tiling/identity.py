"""What a raster is read from, as it is now: equal twice only where no pixel can have changed in between."""

import hashlib
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tiling.addresses import without_secrets
from tiling.behind import Behind, behind, local_place, members
from tiling.virtual import read_start, remote_headers

_WHOLE = 4 * 2**20  # a file of so many bytes is hashed whole,
_EDGE = 2**20  # of a larger one the ends
_SAMPLE, _SAMPLES = 2**16, 32  # and so many parts between them, besides size and time
_SMALL_STORE = 500  # files of a folder, all of which are looked into; else size and time are enough

# Name (without credentials and query), bytes, time or ETag, hash of the content; 0 and "" where unknown.
FileIdentity = tuple[str, int, str, str]


@dataclass(frozen=True)
class Identity:
    """files: one entry each; unknown: why more can't be known, so that nothing made from it may be reused."""

    files: tuple[FileIdentity, ...]
    unknown: tuple[str, ...] = ()


def identity(address: str | os.PathLike[str], found: Behind | None = None) -> Identity:
    """Of everything that a raster is read from; `found`: what `behind` said, if it was asked already."""
    found = behind(address) if found is None else found
    files: list[FileIdentity] = []
    unknown = list(found.unknown)
    for text in found.texts:
        files.append(("", len(text), "", hashlib.sha256(text.encode()).hexdigest()))
    for name in found.files:
        place = local_place(name)
        if place is not None:
            files.extend(_local(place))
        elif name.startswith("/vsi"):
            entry = _virtual(name)
            files.append(entry)
            if not (entry[2] or entry[3]):
                unknown.append(f"{entry[0]}: its server tells neither ETag nor time of its last change")
        else:
            files.append((without_secrets(name), 0, "", ""))
    return Identity(tuple(dict.fromkeys(files)), tuple(unknown))


def file_identity(path: Path) -> FileIdentity:
    """Of one file of this machine."""
    about = path.stat()
    if path.name.endswith(".aux.xml"):
        # Statistics and histograms that a viewer left say nothing of the pixels.
        return str(path.absolute()), 0, "", _sidecar_hash(path)
    return str(path.absolute()), about.st_size, str(about.st_mtime_ns), _content_hash(path, about.st_size)


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local(place: Path) -> list[FileIdentity]:
    if place.is_dir():
        return [_folder_identity(place)]
    if not place.is_file():
        return [(str(place.absolute()), 0, "", "")]  # a link that leads nowhere
    entry = file_identity(place)
    return [] if not entry[2] and not entry[3] else [entry]


def _folder_identity(folder: Path) -> FileIdentity:
    """One entry for all files of a folder."""
    files = list(members(folder))
    digest, size = hashlib.sha256(), 0
    for file in files:
        about = file.stat()
        size += about.st_size
        looked_into = len(files) <= _SMALL_STORE or file.suffix == ".json" or file.name.startswith(".z")
        content = _content_hash(file, about.st_size) if looked_into else ""
        entry = (str(file.relative_to(folder)), about.st_size, about.st_mtime_ns, content)
        digest.update(repr(entry).encode())
    return str(folder.absolute()), size, str(len(files)), digest.hexdigest()


def _content_hash(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
            return digest.hexdigest()
        _sample(file, size, digest)
    return digest.hexdigest()


def _sample(file: BinaryIO, size: int, digest: "hashlib._Hash") -> None:
    digest.update(file.read(_EDGE))
    for k in range(1, _SAMPLES + 1):
        file.seek(size * k // (_SAMPLES + 1))
        digest.update(file.read(_SAMPLE))
    file.seek(size - _EDGE)
    digest.update(file.read(_EDGE))


def _sidecar_hash(path: Path) -> str:
    """Of what a .aux.xml says of the pixels; empty where that is nothing."""
    content = path.read_bytes()
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return hashlib.sha256(content).hexdigest()
    for node in list(root.iter()):
        for child in list(node):
            statistic = child.tag == "MDI" and child.get("key", "").startswith("STATISTICS_")
            if child.tag == "Histograms" or statistic:
                node.remove(child)
    for node in list(root.iter()):
        for child in list(node):
            if child.tag == "Metadata" and len(child) == 0 and not (child.text or "").strip():
                node.remove(child)
    for node in list(root):
        if node.tag == "PAMRasterBand" and len(node) == 0 and not (node.text or "").strip():
            root.remove(node)
    if len(root) == 0:
        return ""
    plain = re.sub(rb">\s+<", b"><", ElementTree.tostring(root))
    return hashlib.sha256(plain).hexdigest()


def _virtual(name: str) -> FileIdentity:
    """A file behind a URL or in a bucket, or one in memory."""
    shown = without_secrets(name)
    headers = remote_headers(name)
    size = headers.get("content-length", "")
    stamp = headers.get("etag") or headers.get("last-modified", "")
    content = read_start(name, _SAMPLE if stamp else _WHOLE + 1) or b""
    if not stamp and not 0 < len(content) <= _WHOLE:
        return shown, 0, "", ""
    return shown, int(size) if size.isdigit() else 0, stamp, hashlib.sha256(content).hexdigest()
