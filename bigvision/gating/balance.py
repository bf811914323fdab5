"""Loss-free balancing: a bias on the scores that select, moved against the load.

Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts".

Legend: T tokens, E experts.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BiasBalancer(nn.Module):
    """A bias for each expert: an update moves it up by ``rate`` where load was under the mean, else down.

    Everything kept is an integer: the load since the last update, and how often each bias was moved up less
    how often down. The counts stay exact past 2**24 (where float32 counters stop counting, and bf16 ones at
    2**8), the bias can be cast to no narrower type, and its mean is 0 by construction.

    Args:
        num_experts: E.
        rate: how far one update moves a bias, in units of the scores.

    Raises:
        ValueError: E below 1 or a negative rate.
    """

    counts: Tensor
    ticks: Tensor

    def __init__(self, num_experts: int, rate: float = 1e-3) -> None:
        super().__init__()
        if num_experts < 1 or not rate >= 0:
            raise ValueError(
                f"needs at least 1 expert and a rate of at least 0, got {num_experts} and {rate}"
            )
        self.rate = rate
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("ticks", torch.zeros(num_experts, dtype=torch.int64))

    @property
    def bias(self) -> Tensor:
        """float32 [E], to be added to the scores that select; its mean is 0."""
        # The integer mean comes off first, exactly; what is left is small enough for float64.
        ticks = self.ticks * len(self.ticks) - self.ticks.sum()
        return (ticks.double() * (self.rate / len(self.ticks))).float()

    @torch.no_grad()
    def observe(self, load: Tensor) -> None:
        """Add a load: a mask bool [T, E], or counts int64 [E].

        Raises:
            ValueError: another shape or dtype.
        """
        num_experts = len(self.counts)
        if load.dtype == torch.bool and load.dim() == 2 and load.shape[1] == num_experts:
            load = load.sum(0)
        if load.dtype != torch.int64 or load.shape != (num_experts,):
            raise ValueError(
                f"a load is bool [T, {num_experts}] or int64 [{num_experts}], "
                f"got {load.dtype} {list(load.shape)}"
            )
        self.counts += load

    @torch.no_grad()
    def update(self, group: dist.ProcessGroup | None = None) -> None:
        """Move the biases against the load since the last update, of all ranks of ``group`` if given."""
        if group is not None:
            dist.all_reduce(self.counts, group=group)
        # sign(mean - count) in integers.
        self.ticks += (self.counts.sum() - self.counts * len(self.counts)).sign()
        self.counts.zero_()
