"""Which code a network is made of: the sources behind its factory and its classes, and packages' versions.

Sources of one's own are followed through their imports and hashed; of an installed package the version and
its list of files count. What the code computes is another matter, which the network's graph tells.
"""

import ast
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import ModuleType
from weakref import WeakKeyDictionary

from torch import nn

from bigvision.models.spec import file_module, parse_spec

_KNOWN = {"torch", "torchgen", "functorch", "numpy"}  # whose versions are on record, or don't matter
# The hash of each imported module's source at the first look.
_FIRST_SEEN: WeakKeyDictionary[ModuleType, str] = WeakKeyDictionary()


@dataclass
class _Code:
    """What was found so far."""

    sources: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)


def code_identity(text: str, model: nn.Module) -> dict[str, dict[str, str]]:
    """{"sources": hash by file, "packages": version by name} of the model that `text` names.

    Raises:
        ValueError: a source is another than when this process imported it.
    """
    code, spec = _Code(), parse_spec(text)
    if spec.is_file:
        path, module = Path(spec.source), file_module(Path(spec.source))
        code.seen.add(module)
        code.sources[path.name] = _first_look(module, path)
        if not spec.is_program:
            _follow(code, path, module, package="")
    else:
        name = "torchvision.models" if spec.source == "torchvision" else spec.source
        _visit(code, name, look_into=True)
        factory = getattr(sys.modules.get(name), spec.factory, None)
        _visit(code, getattr(factory, "__module__", None) or name, look_into=True)
    for kind in {parent for module in model.modules() for parent in type(module).__mro__}:
        _visit(code, kind.__module__, look_into=True)
    return {"sources": dict(sorted(code.sources.items())), "packages": dict(sorted(code.packages.items()))}


def _visit(code: _Code, name: str, *, look_into: bool = False) -> None:
    """Note a module with all above it. look_into: hash its source even in an installed package."""
    top = name.partition(".")[0]
    if top in _KNOWN or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return
    parts = name.split(".")
    for stop in range(1, len(parts) + 1):
        module = ".".join(parts[:stop])
        path = _source(module)
        if path is None:
            continue
        installed = _distribution(top, _root(path, stop))
        if installed is not None:
            code.packages[installed[0]] = installed[1]
        if module in code.seen or not (installed is None or (look_into and stop == len(parts))):
            continue
        code.seen.add(module)
        code.sources[module] = _first_look(module, path)
        if installed is None:
            _follow(code, path, module, module if path.stem == "__init__" else module.rpartition(".")[0])


def _follow(code: _Code, path: Path, name: str, package: str) -> None:
    """Visit what a source imports, wherever in it."""
    if path.suffix != ".py":
        return
    try:
        tree = ast.parse(_content(name, path))
    except (SyntaxError, ValueError):
        return
    for imported in _imports(tree, package):
        if imported != name:
            _visit(code, imported)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of modules; of `from a import b` a and a.b, which may be one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                try:
                    base = resolve_name("." * node.level + base, package)
                except ImportError:
                    continue
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _source(name: str) -> Path | None:
    """The file of a module, whether it was imported or only could be; None for what is none."""
    module = sys.modules.get(name)
    if isinstance(module, ModuleType):
        found = getattr(module, "__file__", None)
        return Path(found) if found else None
    parent, _, _ = name.rpartition(".")
    places = list(getattr(sys.modules.get(parent), "__path__", None) or _packages(parent)) if parent else []
    try:
        spec = PathFinder.find_spec(name, places) if parent else find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _packages(name: str) -> list[str]:
    source = _source(name)
    return [str(source.parent)] if source is not None and source.stem == "__init__" else []


def _root(path: Path, depth: int) -> Path:
    """The folder that a module of so many names is found in."""
    up = depth if path.stem == "__init__" else depth - 1
    return path.resolve().parents[up] if up < len(path.resolve().parents) else path.parent


def _first_look(module: str, path: Path) -> str:
    """A source's hash; ValueError where the module was imported before the source became what it is."""
    now, known = hashlib.sha256(_content(module, path)).hexdigest(), sys.modules.get(module)
    if isinstance(known, ModuleType) and _FIRST_SEEN.setdefault(known, now) != now:
        raise ValueError(f"{path}: changed since this process imported it; start anew to use it as it is")
    return now


def _content(module: str, path: Path) -> bytes:
    """A source's bytes, also where it lies in an archive that Python imports from."""
    if path.is_file():
        return path.read_bytes()
    loader = getattr(getattr(sys.modules.get(module), "__spec__", None), "loader", None)
    try:
        return bytes(loader.get_data(str(path)))  # type: ignore[union-attr]
    except (AttributeError, OSError) as error:
        raise ValueError(f"{path}: the source of module {module} can't be read: {error}") from error


@cache
def _distribution(top: str, root: Path) -> tuple[str, str] | None:
    """(name, version and hash of the list of files) of what is installed in `root` under a package's name."""
    for found in metadata.distributions(path=[str(root)]):
        record = found.read_text("RECORD")
        if record is None:
            continue
        names = (found.read_text("top_level.txt") or "").split() or [found.metadata["Name"].replace("-", "_")]
        if top in names or f"\n{top}/" in f"\n{record}" or f"\n{top}.py," in f"\n{record}":
            digest = hashlib.sha256(record.encode()).hexdigest()
            return found.metadata["Name"], f"{found.version} {digest[:16]}"
    return None
