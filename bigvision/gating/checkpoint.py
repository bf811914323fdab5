"""Checkpoints by global expert id: what 4 ranks saved, 2 or 3 (or 1) load.

A checkpoint is a folder of safetensors files. Each rank writes its own experts under ``experts.<global
id>.<name>``; the first also writes what all ranks share (scorer, balancer) under ``shared.<name>``. Readers
look for names, not for ranks. The folder appears under its name only when every file is complete.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from bigvision.ranks import Ranks
from bigvision.tensors import save_tensors

from .exchange import expert_range


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _own(experts: Sequence[nn.Module], num_experts: int, rank: int, world: int) -> range:
    own = expert_range(num_experts, rank, world)
    if len(experts) != len(own):
        raise ValueError(f"rank {rank} of {world} holds experts {own}, got {len(experts)} modules")
    return own


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_tensors(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def expert_tensors(experts: Sequence[nn.Module], own: range) -> dict[str, Tensor]:
    """The state of experts by global id: {"experts.<id>.<name>": tensor}."""
    return {
        f"experts.{i}.{name}": tensor
        for i, expert in zip(own, experts, strict=True)
        for name, tensor in expert.state_dict().items()
    }


def save_experts(
    path: str | Path,
    experts: Sequence[nn.Module],
    num_experts: int,
    *,
    shared: nn.Module | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Save a gate and its experts; all ranks of the group take part.

    Args:
        path: the folder to appear; must not exist.
        experts: this rank's, by :func:`expert_range`.
        num_experts: E, of all ranks.
        shared: what all ranks hold alike (a gate); written by the first.
        group: of the ranks; all if absent, one process without ``torch.distributed``.

    Raises:
        ValueError: another number of experts than the rank's.
        FileExistsError: the folder is there already.
        RanksError: what failed on any of several ranks, a ValueError raised on all of them.
    """
    path = Path(path)
    folder = _partial(path)
    ranks = Ranks.current(group)
    rank, world = ranks.rank, ranks.size
    with _together(ranks, f"saving {path}"):
        own = _own(experts, num_experts, rank, world)
        if path.exists():
            raise FileExistsError(f"{path} exists already")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = expert_tensors(experts, own)
        if rank == 0 and shared is not None:
            tensors |= {f"shared.{name}": tensor for name, tensor in shared.state_dict().items()}
        _write(folder / f"rank-{rank:05d}-of-{world:05d}.safetensors", tensors)
    with _together(ranks, f"saving {path}"):
        if rank == 0:
            for stale in set(folder.iterdir()) - set(_names(folder, world)):
                stale.unlink()  # of an attempt with another number of ranks that did not finish
            folder.replace(path)


@contextmanager
def _together(ranks: Ranks, doing: str) -> Iterator[None]:
    """An error on any rank is the same one on all; a process alone raises its own."""
    with ranks.together(doing) if ranks.size > 1 else nullcontext():
        yield


def _names(folder: Path, world: int) -> Iterator[Path]:
    return (folder / f"rank-{rank:05d}-of-{world:05d}.safetensors" for rank in range(world))


def load_experts(
    path: str | Path,
    experts: Sequence[nn.Module],
    num_experts: int,
    *,
    shared: nn.Module | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Load what :func:`save_experts` saved, on any number of ranks; each reads its own experts only.

    Args:
        path: the folder.
        experts: this rank's, by :func:`expert_range` for the present number of ranks.
        num_experts: E, as when saved.
        shared: as when saved.
        group: of the ranks.

    Raises:
        ValueError: another number of experts than saved, or tensors that are missing, left over or shaped
        otherwise.
        FileNotFoundError: no such folder.
        RanksError: what failed on any of several ranks, a ValueError raised on all of them.
    """
    path = Path(path)
    ranks = Ranks.current(group)
    rank, world = ranks.rank, ranks.size
    with _together(ranks, f"loading {path}"), ExitStack() as stack:
        if not path.is_dir():
            raise FileNotFoundError(f"no checkpoint at {path}")
        own = _own(experts, num_experts, rank, world)
        files = [stack.enter_context(safe_open(f, "pt")) for f in sorted(path.glob("*.safetensors"))]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
        saved = {int(name.split(".")[1]) for name in where if name.startswith("experts.")}
        if saved and max(saved) + 1 != num_experts:
            raise ValueError(f"the checkpoint holds {max(saved) + 1} experts, asked for {num_experts}")
        for i, expert in zip(own, experts, strict=True):
            _load_module(expert, f"experts.{i}.", where)
        if shared is not None:
            _load_module(shared, "shared.", where)


def _load_module(module: nn.Module, prefix: str, where: Mapping[str, safe_open]) -> None:
    names = {name.removeprefix(prefix) for name in where if name.startswith(prefix)}
    wanted = module.state_dict()
    if names != set(wanted):
        raise ValueError(
            f"{prefix}*: missing {sorted(set(wanted) - names)}, unexpected {sorted(names - set(wanted))}"
        )
    state = {name: where[prefix + name].get_tensor(prefix + name) for name in sorted(names)}
    for name, tensor in state.items():
        if tensor.shape != torch.as_tensor(wanted[name]).shape:
            raise ValueError(f"{prefix}{name} is {list(tensor.shape)}, expected {list(wanted[name].shape)}")
    module.load_state_dict(state)
