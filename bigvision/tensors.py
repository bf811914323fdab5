"""Tensors into files: with the permissions of any new file, and the system's own error if that fails."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name as safetensors; the file appears at `path` when it is complete.

    The library writes to a file of its own name that only its owner may read. Here that stands in a hidden
    folder beside `path`, which the next call clears where a kill has left it.

    Raises:
        OSError: naming `path`, with the system's reason.
    """
    folder = path.with_name(f".{path.name}.partial")
    plain = _apart(tensors)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        place = folder / "tensors"
        place.touch()  # with the mode of a new file here, by umask or access list
        mode = place.stat().st_mode & 0o777
        save_file(plain, place, metadata=metadata)
        place.chmod(mode)
        place.replace(path)
    except SafetensorError as error:
        raise _told(error, path) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write plain values and tensors by `torch.save`, errors as `save_tensors` has them."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch's archive writer only says where it was interrupted; the system's error came before.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous; what shares another's memory (tied weights) is copied."""
    plain, places = {}, set()
    for name, tensor in tensors.items():
        alone = tensor.detach().cpu().contiguous()
        place = alone.untyped_storage().data_ptr()
        plain[name] = alone.clone() if place in places else alone
        places.add(place)
    return plain


def _told(error: SafetensorError, path: Path) -> Exception:
    number = re.search(r"os error (\d+)", str(error))
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])), str(path))
