"""What a head is made of, by name: for `state_dict` and for checkpoints.

Legend: n classes of this rank.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from heads.module import HeadModule


def row_tensors(head: "HeadModule") -> dict[str, Tensor]:
    """Live tensors [n, ...] with a row a class of this rank: centres, moments, what the gate keeps."""
    shard = head.shard
    found = {name: shard.store.whole(name).detach() for name in shard.store.names} | shard.narrow
    if shard.last_step is not None:
        found["last_step"] = shard.last_step
    if head.gate is not None:
        found |= {f"gate.{name}": tensor for name, tensor in head.gate.row_state().items()}
    return found


def shared_tensors(head: "HeadModule") -> dict[str, Tensor]:
    """Live tensors of the gate that are the same on every rank."""
    return {} if head.gate is None else {f"gate.{k}": v for k, v in head.gate.shared_state().items()}


def position(head: "HeadModule") -> dict[str, Any]:
    """Where the training stands: steps, steps skipped, the learning rate, those of all steps so far."""
    return {
        "step": head.step,
        "skipped": head.skipped,
        "lr": None if head.optimizer is None else head.optimizer.param_groups[0]["lr"],
        "rates": None if head.shard.history is None else head.shard.history.rates,
    }


def settle(head: "HeadModule") -> None:
    """Counts a step that an optimiser has taken and no loss has seen yet. Called on every rank together."""
    if head.weight is not None:
        head._measure_norms()
        head.count_step()


def resume(head: "HeadModule", found: dict[str, Any]) -> None:
    """Goes on from what has been written into the live tensors, and from a `position`."""
    shard = head.shard
    shard.store.reload()
    head.step, head.skipped = found["step"], found["skipped"]
    if head.optimizer is not None:
        head.optimizer.param_groups[0]["lr"] = found["lr"]
    if shard.history is not None:
        shard.history.replay(found["rates"])
    head._measure_norms()
    head.forget_moves()
    if head.gate is not None:
        head.gate.restored()


def save_state(head: "HeadModule") -> dict[str, Tensor]:
    """Live tensors by name, of a head that is whole on this rank; what is a parameter or buffer is not here.

    Raises RuntimeError where the head is spread over ranks: one rank's state would lose the others' classes.
    """
    if head.ranks.size > 1:
        raise RuntimeError(
            f"the centres are spread over {head.ranks.size} ranks: a state_dict has no room for them; "
            "use heads.save_head(head, folder) and heads.load_head(head, folder)"
        )
    settle(head)
    state = row_tensors(head) | shared_tensors(head) | _position_tensors(head)
    return {name: tensor for name, tensor in state.items() if name != "weight" or head.weight is None}


def _position_tensors(head: "HeadModule") -> dict[str, Tensor]:
    """`position` as tensors, which load with nothing unpickled."""
    now = position(head)
    found = {name: torch.tensor(now[name], dtype=torch.int64) for name in ("step", "skipped")}
    numbers = {name: now[name] for name in ("lr", "rates") if now[name] is not None}
    return found | {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


@torch.no_grad()
def load_state(
    head: "HeadModule", state: dict[str, Any], prefix: str, missing: list[str], errors: list[str]
) -> None:
    """Puts what `save_state` gave, here under `prefix`, into the head; names what is missing or wrong."""
    now = _position_tensors(head)
    for name, target in save_state(head).items():
        value = state.get(prefix + name)
        if value is None:
            missing.append(prefix + name)
        elif name == "rates":
            now[name] = value
        elif value.shape != target.shape:
            errors.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {list(value.shape)} from "
                f"checkpoint, the shape in current model is {list(target.shape)}."
            )
        elif name in now:
            now[name] = value
        else:
            target.copy_(value)
    resume(head, {"lr": None, "rates": None} | {name: value.tolist() for name, value in now.items()})
