"""A head as a module among others: moved and cast with a model, saved with it, told that centres have moved.

Legend: n classes of this rank, D dimension.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigvision.ranks import Ranks
from heads.gates import ActiveGate
from heads.optimizers import FusedSteps
from heads.shard import ActiveRows, Shard
from heads.state import load_state, save_state
from heads.stores import STORAGE


class HeadModule(nn.Module):
    """What is common to all heads of a shard. `weight` is None where the optimiser is fused."""

    _shard: Shard
    _anchor: Tensor
    _version: int  # of fused centres
    _moved: bool = False  # a parameter's lengths were seen to change
    _awaited: bool = False  # a backward has given a parameter its gradient
    _seen: tuple[int, ...] = ()  # a parameter's moment when its last step began
    ranks: Ranks
    dim: int
    weight: nn.Parameter | None
    gate: ActiveGate | None
    optimizer: FusedSteps | None
    step: int
    skipped: int

    @property
    def shard(self) -> Shard:
        """This rank's classes; where the centres are a parameter, of its present device and dtype.

        Raises ValueError where that parameter has become something that can't be centres.
        """
        shard, weight = self._shard, self.weight
        if weight is not None and weight.shape != (len(shard.classes), self.dim):
            shape = [len(shard.classes), self.dim]
            raise ValueError(f"head.weight must be {shape}, got {list(weight.shape)}")
        if weight is None or (weight.dtype, weight.device) == (shard.dtype, shard.device):
            return shard
        if weight.dtype not in STORAGE.values():
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(f"head.weight must be float64, float32 or bfloat16, got {kind}")
        self._move(weight.device, weight.dtype)
        return shard

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        self._shard.to(device, dtype)
        self._anchor.data = self._anchor.data.to(device)
        if self.gate is not None:
            self.gate.follow()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HeadModule":
        """Moves the centres with the model. The dtype of fused ones is `storage`, whatever the model's is."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self._shard.device)).device
        if device != self._shard.device:
            self._move(device, self._shard.dtype if self.weight is None else self.weight.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: tensor for name, tensor in save_state(self).items()}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {prefix + name for name in save_state(self)}
        rest = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        load_state(self, state_dict, prefix, missing_keys, error_msgs)

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """Measures the lengths of the centres anew and tells the gate, after somebody else has changed them.

        Called on every rank together. Where the centres are a parameter every loss does so itself.
        """
        self._measure_norms(self.gate)
        if self.gate is not None:
            self.gate.settle(ActiveRows())

    def _measure_norms(self, gate: ActiveGate | None = None) -> None:
        shard = self.shard
        self._version += 1
        for rows in shard.row_tiles():
            w = shard.store.load(rows, ("weight",))["weight"]
            inverse = shard.kernels.inverse_norms(w, shard.acc)
            if self.weight is not None:
                self._moved = self._moved or not torch.equal(inverse, shard.inverse_norm[rows])
            shard.inverse_norm[rows] = inverse
            if gate is not None:
                gate.moved(rows, w, inverse)

    def count_step(self) -> None:
        """Counts a step where, since a backward, somebody's optimiser has moved the parameter.

        Called on every rank together, after the norms have been measured. Until then all losses are of one
        step, with one sample of classes, however many parts its gradient is put together from.
        """
        if self.weight is None:
            return
        moved = torch.tensor([self._moved or self._moment() != self._seen], device=self.shard.device).int()
        if int(self.ranks.max_(moved)):
            self.step += int(self._awaited)
            self.forget_moves()

    def forget_moves(self) -> None:
        """The centres are where a step begins."""
        self._moved, self._awaited, self._seen = False, False, self._moment()

    def _moment(self) -> tuple[int, ...]:
        """What is another one after the centres have moved."""
        if self.weight is None:
            return (self._version,)
        return (self.weight.data_ptr(), self.weight._version)
