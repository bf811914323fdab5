"""Tile functions compiled ahead of time, in a process of their own, once for all runs.

`torch.compile` builds a function inside the process that calls it: every rank then holds the compiler, and
checks its guards at each call. Here a function is exported with its numbers of classes and samples left open
and built by AOTInductor in a child process; ranks only load the library. It is kept in the user's cache
folder, under a digest of everything that its machine code depends on.

Legend: K classes of a tile and B samples vary from call to call, D dimension doesn't.
"""

import hashlib
import inspect
import logging
import os
import pickle
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from heads import counter, kernels, optimizers

_TENSORS = (Tensor, dict, tuple)
_EXAMPLE = {"K": 64, "B": 32}  # sizes to export with: any but 0 and 1, which are special there
_CHILD = "import pickle, sys; from heads.ahead import build; build(*pickle.load(sys.stdin.buffer))"


@dataclass(frozen=True)
class Signature:
    """What a library is built for. `dtypes` are the tensor arguments with a dtype in each tensor's place.

    device is "cpu" or a GPU by its number, such as "cuda:1"; processor tells GPUs of different kinds apart.
    """

    function: Callable[..., Any]
    constants: tuple[Any, ...]  # by place, None where a tensor goes
    dtypes: Any
    shapes: tuple[str, ...]
    dim: int
    device: str
    threads: int
    processor: str = ""

    def digest(self) -> str:
        """The name of the library: the same for GPUs of one kind, whatever their numbers."""
        rules = [type(constant) for constant in self.constants if is_dataclass(constant)]
        files = [inspect.getfile(part) for part in (Signature, counter, kernels, optimizers, *rules)]
        name = self.function.__name__
        kind = (torch.device(self.device).type, self.processor)
        settings = (name, self.constants, self.dtypes, self.shapes, self.dim, kind, self.threads)
        parts = [*(Path(file).read_bytes() for file in files), repr(settings).encode()]
        return hashlib.sha256(b"\0".join([*parts, torch.__version__.encode(), _machine()])).hexdigest()[:32]


class Library:
    """Built functions in a folder that the processes of a user share.

    Where building or loading fails, `load` says so once and returns None from then on.
    """

    def __init__(self, folder: Path | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = folder or home / "bigvision" / "kernels"
        self.broken = False

    def load(self, signature: Signature) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """The function of a flat list of tensors, built now if it never was."""
        if self.broken:
            return None
        try:
            path = self.folder / f"{signature.digest()}.pt2"
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.is_file():
                    _build_apart(signature, path)
            number = -1 if signature.device == "cpu" else torch.device(signature.device).index
            # What torch._inductor.aoti_load_package wraps, without importing the compiler to get at it.
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, number)
        except Exception as error:  # whatever the many layers below raise
            self.broken = True
            warnings.warn(
                f"compiling doesn't work here ({error}): the head runs eagerly, several times slower",
                stacklevel=2,
            )
            return None
        run: Callable[[list[Tensor]], list[Tensor]] = loader.boxed_run
        return run


class AheadKernel:
    """A function of tensors and constants, called as the function itself is.

    Args:
        library: where it is built; where it can't be, the function itself is called.
        function: of a module. Its arguments are tensors, dicts and tuples of tensors, or constants; it may
            write into its tensors, and returns a tensor or a tuple of tensors.
        shapes: of each argument that isn't a constant, in letters: "KB", "K", or "" for a scalar. All
            tensors of a dict or tuple have the one shape.
    """

    def __init__(self, library: Library, function: Callable[..., Any], *shapes: str) -> None:
        self.library, self.function, self.shapes = library, function, shapes
        self._runners: dict[Any, Callable[[list[Tensor]], list[Tensor]] | None] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        tensors = tuple(a for a in arguments if isinstance(a, _TENSORS))
        constants = tuple(None if isinstance(a, _TENSORS) else a for a in arguments)
        leaves = [leaf.contiguous() for leaf in pytree.tree_leaves(tensors)]
        dim = next((leaves[0].shape[1] for shape in self.shapes[:1] if "D" in shape), 0)
        where = leaves[0].device
        key = (constants, dim, where, torch.get_num_threads(), *(leaf.dtype for leaf in leaves))
        if key not in self._runners:
            dtypes = pytree.tree_map(lambda leaf: leaf.dtype, tensors)
            threads, kind = torch.get_num_threads(), processor(where)
            signature = Signature(
                self.function, constants, dtypes, self.shapes, dim, str(where), threads, kind
            )
            self._runners[key] = self.library.load(signature)
        run = self._runners[key]
        if run is None:
            return self.function(*arguments)
        results = run(leaves)
        return results[0] if len(results) == 1 else tuple(results)


class _Exported(nn.Module):
    def __init__(self, function: Callable[..., Any], constants: tuple[Any, ...]) -> None:
        super().__init__()
        self.function, self.constants = function, constants

    def forward(self, *tensors: Any) -> Any:
        rest = iter(tensors)
        return self.function(*(next(rest) if c is None else c for c in self.constants))


def build(signature: Signature, path: Path) -> None:
    """Compiles a function into the package `path`."""
    torch.set_num_threads(signature.threads)
    sizes = _EXAMPLE | {"D": signature.dim}
    open_sizes = {letter: torch.export.Dim(letter, min=1, max=1 << 24) for letter in _EXAMPLE}

    def example(dtype: torch.dtype, shape: str) -> Tensor:
        return torch.zeros([sizes[letter] for letter in shape], dtype=dtype, device=signature.device)

    def varying(shape: str) -> dict[int, Any]:
        return {place: open_sizes[letter] for place, letter in enumerate(shape) if letter in open_sizes}

    pairs = list(zip(signature.dtypes, signature.shapes, strict=True))
    examples = tuple(pytree.tree_map(lambda dtype, s=s: example(dtype, s), part) for part, s in pairs)
    dynamic = tuple(pytree.tree_map(lambda _, s=s: varying(s), part) for part, s in pairs)
    with torch.no_grad():
        module = _Exported(signature.function, signature.constants)
        program = torch.export.export(module, examples, dynamic_shapes=(dynamic,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _build_apart(signature: Signature, path: Path) -> None:
    """Builds in a child process, so that this one never holds the compiler."""
    from tiling.publish import complete  # rasters' libraries, which a head needs for nothing else

    logging.getLogger(__name__).info("compiling %s once", signature.function.__name__)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "OMP_NUM_THREADS": str(signature.threads),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    with complete(path) as place:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=pickle.dumps((signature, place)),
            env=environment,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise OSError(lines[-1] if lines else f"the compiler ended with status {done.returncode}")


def processor(device: torch.device) -> str:
    """What tells GPUs of different machine code apart; of the CPU every library's name knows anyway."""
    if device.type == "cpu":
        return ""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, compute capability {found.major}.{found.minor}, CUDA {torch.version.cuda}"


def _machine() -> bytes:
    """What tells processors of different instruction sets apart."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = next(line for line in text.splitlines() if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}".encode()
