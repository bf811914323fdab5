"""Counter-based bits: starting centres, and rounding that is right on average."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bigvision.gating import counter_key
from heads import SGD, Adam, Margin, ShardedMarginHead, kernels, sampled
from heads.counter import (
    STREAM_CATCH_UP,
    STREAM_INIT,
    STREAM_ROUNDING,
    normal_rows,
    round_stochastically,
    rounding_noise,
    row_keys,
    row_noise,
)


def test_starting_centres_are_nearly_normal_and_all_different() -> None:
    rows = normal_rows(3, torch.arange(20_000), 16, 0.01, torch.float64)
    assert abs(rows.mean()) < 1e-4 and abs(rows.std() - 0.01) < 1e-4
    kurtosis = ((rows / 0.01) ** 4).mean()
    assert 2.5 < kurtosis < 3.1  # 3 for the normal distribution, 2.7 for a sum of four uniform numbers
    assert len(rows.unique(dim=0)) == len(rows)
    unit = torch.nn.functional.normalize(rows[:500])
    off = (unit @ unit.t()).fill_diagonal_(0)
    assert abs(off.mean()) < 3e-3 and abs(off.std() - 16**-0.5) < 0.01


def test_a_shard_draws_what_the_whole_draws_and_other_seeds_others() -> None:
    whole = normal_rows(3, torch.arange(100), 8, 1.0, torch.float32)
    assert torch.equal(normal_rows(3, torch.arange(40, 60), 8, 1.0, torch.float32), whole[40:60])
    assert not (normal_rows(4, torch.arange(100), 8, 1.0, torch.float32) == whole).all(1).any()
    far = torch.tensor([2**31 + 5, 5, 2**40 + 5])  # ids beyond 32 bits are ids of their own
    assert len(normal_rows(3, far, 8, 1.0, torch.float32).unique(dim=0)) == 3


def mixed(x: int) -> int:
    """The hash prospector's mixer on Python's integers, of 32 bits."""
    x &= 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


@pytest.mark.parametrize("ids", [[0, 1, 77], [2**31 - 1, 2**31, 2**40 + 5]])
def test_bits_are_those_of_the_definition(ids: list[int]) -> None:
    """Another constant would do as well, but a run that is resumed must draw what it would have drawn."""
    seed, step, dim = 3, 11, 5
    for stream, at in ((STREAM_INIT, 0), (STREAM_CATCH_UP, step), (STREAM_ROUNDING, step)):
        base = counter_key(seed, stream, at)
        low, high = [i & 0x7FFFFFFF for i in ids], [i >> 31 for i in ids]
        first = [mixed(mixed(a ^ base) + b) for a, b in zip(low, high, strict=True)]
        second = [mixed(mixed(a + (base >> 32)) ^ b) for a, b in zip(low, high, strict=True)]
        keys = row_keys(seed, stream, at, torch.tensor(ids))
        assert [[int(k) & 0xFFFFFFFF for k in key] for key in keys] == [first, second]
        golden = [column * 0x9E3779B9 for column in range(dim)]
        for number in range(4):
            words = [[mixed(k ^ g) for g in golden] for k in (first, second)[number // 2]]
            expected = [[(w >> 16 * (number % 2)) & 0xFFFF for w in row] for row in words]
            noise = rounding_noise(keys, number, dim) & 0xFFFF
            assert noise.tolist() == expected
        if stream == STREAM_INIT:
            bits = [[mixed(mixed(a ^ g) ^ b) for g in golden] for a, b in zip(first, second, strict=True)]
            sums = [[sum(word.to_bytes(4, "little")) - 510 for word in row] for row in bits]
            drawn = normal_rows(seed, torch.tensor(ids), dim, 147.8005, torch.float64)
            torch.testing.assert_close(drawn, torch.tensor(sums, dtype=torch.float64))


def test_rounding_is_between_the_neighbours_and_unbiased() -> None:
    x = torch.tensor([1.0 + 2**-8 / 3, -0.3, 3e-20, 1024.0, 0.0]).repeat(40_000, 1)
    key, _ = row_keys(0, 9, 5, torch.arange(len(x)))
    rounded = round_stochastically(x, row_noise(key, torch.arange(5, dtype=torch.int32))).float()
    spacing = x[0].abs() * 2**-7
    assert ((rounded - x).abs() <= spacing).all()
    assert torch.equal(rounded[:, 3:], x[:, 3:])  # what bfloat16 can hold stays as it is
    assert ((rounded.mean(0) - x[0]).abs() <= 5 * spacing / 40_000**0.5).all()


@pytest.mark.parametrize("rule", [SGD(0.0, 0.5), Adam(0.0)])
def test_columns_of_a_row_are_rounded_with_bits_of_their_own(rule: Any) -> None:
    """Equal numbers in centre and moments go up or down independently, in the step and in catching up."""
    x = torch.full((400, 8), 1.0 + 2**-8)  # half way between two neighbours
    keys = row_keys(0, 2, 5, torch.arange(400))
    ups = [kernels.rounded(x, keys, number) > 1.0 for number in range(1 + len(rule.wide))]
    columns = {name: x.to(torch.bfloat16) for name in ("weight", *rule.wide)}
    zero, narrow = torch.tensor(0.0), {n: torch.zeros(400) for n in rule.narrow}

    class Unchanged:
        """Leaves every column half way between two neighbours."""

        def step(self, wide: Any, narrow: Any, gradient: Tensor, lr: Tensor) -> Any:
            return dict.fromkeys(wide, x), narrow

    args = (torch.zeros(400, 8), torch.zeros(400), zero, torch.tensor(1.0), keys)
    kernels.update_tile_(Unchanged(), columns, narrow, *args)
    assert all(torch.equal(c.float() > 1.0, up) for c, up in zip(columns.values(), ups, strict=True))
    for i, first in enumerate(ups):
        assert 0.45 < first.float().mean() < 0.55
        for second in ups[i + 1 :]:
            assert 0.45 < (first == second).float().mean() < 0.55  # half by chance, all if bits are shared


def test_rows_that_catch_up_round_centre_and_momentum_independently() -> None:
    """An idle step takes w and m half way between two neighbours each."""
    m = 0.75 * (1 + 2**-7)
    rule = SGD((1 - 2**-8) / m, momentum=0.75, inactive="dense")
    head = ShardedMarginHead(4000, 8, storage="bfloat16", optimizer=rule, active=sampled(1e-9))
    head.shard.store.whole("weight").fill_(2.0)
    head.shard.store.whole("momentum").fill_(1 + 2**-7)
    head.refresh_norms()
    head(torch.randn(1, 8).requires_grad_(), torch.tensor([0])).backward()
    columns, _ = head.shard.load(slice(1, 4000), ("weight", "momentum"))
    ups = [columns["weight"].float() > 1 + 2**-8, columns["momentum"].float() > m]
    for fraction in (ups[0], ups[1], ups[0] == ups[1]):
        assert 0.48 < fraction.float().mean() < 0.52


def test_bfloat16_learns_from_updates_below_its_resolution() -> None:
    """A step of a thousandth of the spacing is lost by rounding to nearest; here it arrives on average."""
    head = ShardedMarginHead(
        2000, 16, Margin(), 8.0, storage="bfloat16", optimizer=SGD(0.0, weight_decay=1.0), init_std=1.0
    )
    before = head.full_centers().float()
    head.lr = 1e-5
    for _ in range(50):
        head(torch.randn(1, 16), torch.tensor([-1])).backward()
    ratio = (head.full_centers().float() / before)[before.abs() > 0.1]
    assert abs(ratio.mean() - (1 - 1e-5) ** 50) < 1e-4


def test_bfloat16_stays_near_float64() -> None:
    def losses(storage: str) -> list[float]:
        head = ShardedMarginHead(
            400, 32, Margin(1.0, 0.2, 0.0), 16.0, storage=storage, optimizer=SGD(0.05, 0.9), init_std=0.1
        )
        out = []
        for step in range(20):
            generator = torch.Generator().manual_seed(step % 4)
            x = torch.randn(16, 32, generator=generator).requires_grad_()
            loss = head(x, torch.randint(0, 400, (16,), generator=generator))
            loss.backward()
            out.append(loss.item())
        return out

    exact = torch.tensor(losses("float64"))
    assert ((torch.tensor(losses("float32")) - exact).abs() < 1e-4 * exact).all()
    # Eight bits of mantissa: two parts in a hundred.
    assert ((torch.tensor(losses("bfloat16")) - exact).abs() < 2e-2 * exact).all()
    assert exact[-1] < exact[0]
