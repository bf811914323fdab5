"""The class-sharded margin head: softmax over millions of classes whose centres are spread over the ranks.

Legend: b samples of this rank, B of all ranks, D dimension, C classes, n classes of this rank, K of a tile.
"""

from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigvision.ranks import Ranks
from heads.adaptive import AdaptiveMargin, claimed
from heads.building import build_shard, check_settings, constructor_arguments
from heads.collectives import GatheredBatch, gather_batch
from heads.counter import STREAM_ROUNDING
from heads.forecast import Neighbours
from heads.gates import ActiveGate, GateSpec
from heads.kernel_choice import choose_kernels
from heads.margin import Margin
from heads.module import HeadModule
from heads.optimizers import FusedSteps, RowOptimizer
from heads.passes import Pass, backward_pass, forward_pass
from heads.shard import TileGradient
from heads.stores import ParameterRows, Rows


class ShardedMarginHead(HeadModule):
    """Exact class-sharded margin softmax whose optimiser step happens inside backward.

    `loss = head(features, labels)` is the mean over all ranks' valid samples, the same number on every rank.
    `loss.backward()` gives the features their gradient (times the number of ranks, which DDP's averaging
    takes off again, so that the backbone receives the gradient of the global mean) and moves the centres. No
    tensor of B x C elements and no gradient of C x D ever exists: classes are walked in tiles, forward and
    again backward.

    Rules of the fused step:
    - it is taken with the incoming gradient of the loss (its mean over the ranks), divided by `unscale()`
      where that is set; set it to `GradScaler.get_scale` under an fp16 scaler;
    - it is skipped on every rank where the incoming gradient or the loss isn't finite on any: the centres and
      their optimiser stay as they are, the features get NaN gradients (so a scaler skips its own step too),
      and `skipped` counts it;
    - gradient accumulation takes one step each backward, with the gradient it is given;
    - a loss is good for one backward, before the next one moves the centres: later ones raise RuntimeError;
    - a batch without a valid label has loss 0 and gradient 0.
    In eval mode the softmax is over all classes and the centres don't move. Clipping by the gradient norm of
    the whole model can't include the centres, whose gradient never exists as a whole.

    Args:
        num_classes: C, of all ranks together.
        dim: D.
        margin: `Margin`, or a callable from the norms [V] of the valid samples' features to (m1, m2, m3) or
            (m1, m2, m3, penalty), such as `AdaFace` and `MagFace`; the penalty's mean is added to the loss.
        scale: s, the inverse temperature of the cosine logits.
        active: None for the full softmax, or a gate: `sampled(...)`, `clustered(...)`, `hashed(...)`.
        storage: dtype of the centres and their moments. bfloat16 is rounded stochastically, and multiplied
            in float32 where the processor only emulates its products.
        optimizer: `SGD`, `RowwiseAdagrad` or `Adam`, fused into backward; or None, and `head.weight`
            [n, D] is an ordinary parameter for any torch optimiser (its gradient is then n x D).
        normalized: False for the plain softmax x.w*scale, which takes no margin.
        seed: of the initial centres, the sampling and the rounding, all functions of (seed, step, class id).
        tile: K, classes at a time.
        init_std: standard deviation of the initial centres.
        place: "device"; "host", with a cache of `host_cache` hot rows on the device; or a folder for
            memory-mapped files, which may be larger than RAM.
        compiled: fuse the elementwise passes, compiled ahead of time and kept for later runs; eager, with a
            warning, where that doesn't work.
        device: where the work is done.

    Raises:
        ValueError: more ranks than classes, settings outside their range or different between ranks.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        margin: Margin | AdaptiveMargin | None = None,
        scale: float = 64.0,
        *,
        active: GateSpec | None = None,
        storage: str = "float32",
        place: str | Path = "device",
        optimizer: RowOptimizer | None,
        normalized: bool = True,
        seed: int = 0,
        tile: int = 4096,
        init_std: float = 0.01,
        host_cache: int = 1 << 18,
        compiled: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        where = torch.device(device)
        self._settings = deepcopy(constructor_arguments(locals()))
        self.ranks = Ranks.current()
        self.margin = Margin() if margin is None else claimed(margin, where)
        check_settings(self.margin, dim, scale, storage, normalized, tile, optimizer, place)
        self.num_classes, self.dim, self.scale, self.seed = num_classes, dim, scale, seed
        self.rule, self.active = optimizer, active
        self.ranks.same("(num_classes, dim, seed)", (num_classes, dim, seed))
        neighbours = Neighbours.of(self.ranks, where)
        with self.ranks.together("placing the centres"):
            self._shard = build_shard(
                self.ranks, num_classes, dim, storage, optimizer, place, host_cache, where, neighbours
            )
        self._shard.scale, self._shard.normalized = scale, normalized
        self._shard.tile, self._shard.seed = tile, seed
        self._shard.kernels = choose_kernels(compiled)
        self.weight: nn.Parameter | None = None
        self.gate: ActiveGate | None = None
        self.step = 0
        self.skipped = 0
        self.unscale: Callable[[], float] | None = None
        self._version = 0
        self._anchor = torch.zeros((), requires_grad=True, device=where)
        self._initialise(init_std)
        self.optimizer: FusedSteps | None = None
        if optimizer is None:
            self.weight = nn.Parameter(self._shard.store.whole("weight"))
            self._shard.store = ParameterRows(self)
            self.forget_moves()
        else:
            self.optimizer = FusedSteps(self._anchor, optimizer.lr)
        if active is not None:
            self.gate = active.build(self._shard, self.ranks, seed)

    def _initialise(self, std: float) -> None:
        shard = self._shard
        for rows in shard.row_tiles():
            w = shard.kernels.normal_rows(self.seed, shard.ids(rows), self.dim, std, shard.dtype)
            shard.store.store(rows, {"weight": w})
            shard.inverse_norm[rows] = shard.kernels.inverse_norms(w, shard.acc)

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments: `ShardedMarginHead(**head.settings)` starts as this head started."""
        return deepcopy(self._settings)

    @property
    def lr(self) -> float:
        """The learning rate of the next backward; schedulers set it through `head.optimizer`."""
        if self.optimizer is None:
            raise ValueError("the centres are an ordinary parameter: their optimiser has the learning rate")
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        if self.optimizer is None:
            raise ValueError("the centres are an ordinary parameter: their optimiser has the learning rate")
        self.optimizer.param_groups[0]["lr"] = value

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The global mean loss, an acc scalar. Called on every rank together.

        Args:
            features: floating [b, D], finite; b may differ between ranks and may be 0.
            labels: int64 [b] in [0, C), or -1 for samples that don't count.

        Raises:
            ValueError: on every rank, where the input of any is bad; the message names rank and value.
        """
        weight = self._anchor if self.weight is None else self.weight
        loss: Tensor = _ShardedSoftmax.apply(features, weight, labels, self)
        return loss

    def full_centers(self) -> Tensor:
        """All centres [C, D] in class order, on every rank: for tests, export and small heads."""
        shard, chunk = self.shard, -(-self.num_classes // self.ranks.size)
        own = torch.zeros(chunk, self.dim, dtype=shard.dtype, device=shard.device)
        for rows in shard.row_tiles():
            own[rows] = shard.load(rows)[0]["weight"].detach()
        return torch.cat(self.ranks.gather_rows(own))[: self.num_classes]

    @torch.no_grad()
    def set_centers(self, centers: Any) -> None:
        """Replaces all centres, as after an import; the optimiser's state stays. Called on every rank.

        Args:
            centers: [C, D], a tensor or anything sliced by rows like one (a safetensors slice). Each rank
                reads its own rows only, tile by tile.

        Raises:
            ValueError: on every rank, for another shape.
        """
        shard = self.shard
        with self.ranks.together("setting the centres"):
            shape = tuple(centers.get_shape() if hasattr(centers, "get_shape") else centers.shape)
            if shape != (self.num_classes, self.dim):
                raise ValueError(f"centres must be {(self.num_classes, self.dim)}, got {shape}")
            for rows in shard.row_tiles():
                first = shard.classes.start
                w = centers[first + rows.start : first + rows.stop].to(shard.device, shard.dtype)
                shard.store.store(rows, {"weight": w})
            if shard.last_step is not None and shard.history is not None:
                shard.last_step.fill_(len(shard.history))
        self._measure_norms()
        if self.gate is not None:
            self.gate.rebuild()

    @torch.no_grad()
    def dropped_share(self, features: Tensor, labels: Tensor) -> Tensor:
        """The share of each valid sample's softmax that the gate leaves out, measured: float64 [V], all
        ranks'.

        Costs a full softmax, and moves nothing: it is the share that the next step would leave out, with
        clusters as they stand. Without a gate it is 0. Arguments and errors as those of the call.
        """
        batch = self._gather(features, labels)
        if self.weight is not None:
            self.refresh_norms()
        passes = []
        for gate in (copy(self.gate), None):
            margin = deepcopy(self.margin)  # statistics follow the batch, as the step's will
            passes.append(
                forward_pass(self.shard, self.ranks, margin, gate, batch, self.step, self._moment())[1]
            )
        gated, whole = passes
        return torch.expm1((gated.lse - whole.lse).clamp_max(0.0)).abs()[whole.valid]

    def _gather(self, features: Tensor, labels: Tensor) -> GatheredBatch:
        return gather_batch(self.ranks, features, labels, self.dim, self.num_classes, self.shard.device)

    def _run_forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Pass]:
        batch = self._gather(features, labels)
        if self.weight is not None:
            self.refresh_norms()
        if self.training:
            self.count_step()
        gate = self.gate if self.training else None
        if gate is not None:
            gate.renew(self.step)
        loss, done = forward_pass(self.shard, self.ranks, self.margin, gate, batch, self.step, self._moment())
        if gate is not None and self.shard.store.prefetches:
            wanted = gate.expected(self.step + 1)
            if wanted is not None:
                self.shard.store.prefetch(wanted)
        return loss, done

    def _run_backward(self, done: Pass, loss: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the features [b, D] and, where it is a parameter, of the weight [n, D]."""
        if done.moment != self._moment():
            raise RuntimeError(
                "the centres have moved since this loss was computed: a loss takes one backward, at once"
            )
        grad = self.ranks.sum_(grad.to(self.shard.acc).clone()) / self.ranks.size
        if not bool(torch.isfinite(grad) & torch.isfinite(loss)):
            self.skipped += 1
            mine = done.features.unit[done.batch.mine]
            return torch.full_like(mine, torch.nan), None
        if self.weight is not None:
            self._awaited = self._awaited or self.training
            d_weight = torch.zeros_like(self.weight)

            def collect(rows: Rows, columns: dict[str, Tensor], gradient: TileGradient) -> None:
                projected = gradient.projection[:, None] * columns["weight"].detach()
                d_weight[rows] = (gradient.products - projected).to(d_weight.dtype)

            return backward_pass(self.shard, self.ranks, done, grad, collect), d_weight
        if not self.training:
            return backward_pass(self.shard, self.ranks, done, grad, None), None
        return self._step(done, grad), None

    def _step(self, done: Pass, grad: Tensor) -> Tensor:
        shard = self.shard
        lr = torch.tensor(self.lr, dtype=shard.acc, device=shard.device)
        scale = 1.0 if self.unscale is None else self.unscale()
        factor = torch.tensor(1.0 / scale, dtype=shard.acc, device=shard.device)

        def update(rows: Rows, columns: dict[str, Tensor], gradient: TileGradient) -> None:
            self._update(rows, columns, gradient, lr, factor)

        d_x = backward_pass(shard, self.ranks, done, grad, update)
        self._version += 1
        self.step += 1
        if shard.history is not None and shard.last_step is not None:
            shard.history.append(self.lr)
            shard.last_step[slice(None) if done.active.rows is None else done.active.rows] = len(
                shard.history
            )
        if self.gate is not None:
            self.gate.settle(done.active)
        return d_x

    def _update(
        self, rows: Rows, columns: dict[str, Tensor], gradient: TileGradient, lr: Tensor, factor: Tensor
    ) -> None:
        shard = self.shard
        keys = shard.rounding_keys(STREAM_ROUNDING, self.step, rows)
        narrow = {name: column[rows] for name, column in shard.narrow.items()}
        inverse = shard.kernels.update_tile_(
            self.rule, columns, narrow, gradient.products, gradient.projection, lr, factor, keys
        )
        for name, column in narrow.items():
            shard.narrow[name][rows] = column
        shard.inverse_norm[rows] = inverse
        shard.store.store(rows, columns)
        if self.gate is not None:
            self.gate.moved(rows, columns["weight"], inverse)


class _ShardedSoftmax(torch.autograd.Function):
    """Joins the walk to autograd. The second input only gives backward a reason to run."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, labels: Tensor, head: ShardedMarginHead
    ) -> Tensor:
        loss, ctx.done = head._run_forward(features.detach(), labels)
        ctx.head, ctx.dtype, ctx.loss = head, features.dtype, loss.detach().clone()
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_features, d_weight = ctx.head._run_backward(ctx.done, ctx.loss, grads[0])
        return d_features.to(ctx.dtype), d_weight, None, None
