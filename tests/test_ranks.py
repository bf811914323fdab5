"""Ranks: sums, values and errors that are the same on all, in the default group and in a part of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigvision.ranks import Ranks, RanksError

WORKER = """
import sys
import torch
import torch.distributed as dist
from bigvision.ranks import Ranks, RanksError

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=3)
pair = dist.new_group([1, 2])


def check(ranks, members):
    place, first = members.index(rank), members[0]
    assert (ranks.rank, ranks.size, ranks.leads) == (place, len(members), place == 0)
    one = torch.tensor([float(rank)])
    assert float(ranks.sum_(one.clone())) == sum(members) and float(ranks.max_(one.clone())) == 2.0
    assert [float(x) for x in ranks.gather_rows(one)] == members
    assert ranks.gather(str(rank)) == [str(m) for m in members] and ranks.sum(0.5) == len(members) / 2
    ranks.same("the seed", 7)
    for act, words in (
        (lambda: ranks.same("seed", rank), f"seed must be the same on every rank, got rank 0: {first}"),
        (lambda: fail(ranks, ValueError("bad 3")), "reading: bad 3"),
        (lambda: fail(ranks, KeyError("x")), f"reading: rank {len(members) - 1}: KeyError: 'x'"),
        (lambda: nested(ranks), "inner: bad 3"),
    ):
        try:
            act()
        except RanksError as error:
            assert str(error).startswith(words), (str(error), words)
        else:
            raise AssertionError(words)
    with ranks.together("reading"):
        pass
    ranks.barrier()


def fail(ranks, error):
    with ranks.together("reading"):
        if ranks.rank == ranks.size - 1:
            raise error


def nested(ranks):
    with ranks.together("outer"), ranks.together("inner"):
        if ranks.rank == 0:
            raise ValueError("bad 3")


check(Ranks.current(), [0, 1, 2])
if rank:
    check(Ranks.current(pair), [1, 2])
else:
    try:
        Ranks.current(pair)
    except ValueError as error:
        assert str(error) == "rank 0 is not in the group it was given"
    else:
        raise AssertionError
dist.barrier()
dist.destroy_process_group()
"""


def test_three_ranks_and_a_pair_of_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    told = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3, "\n".join(told)


def test_a_process_alone_is_the_first_of_one() -> None:
    ranks, x = Ranks.current(), torch.ones(2)
    assert (ranks.rank, ranks.size, ranks.leads) == (0, 1, True)
    assert ranks.sum_(x) is x and ranks.max_(x) is x and ranks.gather_rows(x)[0] is x
    assert ranks.gather("a") == ["a"] and ranks.sum(2) == 2.0
    ranks.same("anything", object())
    ranks.barrier()
    with pytest.raises(RanksError, match=r"^reading: no such number 3$"), ranks.together("reading"):
        raise ValueError("no such number 3")
    with (
        pytest.raises(RanksError, match=r"^reading: rank 0: OSError: gone$") as told,
        ranks.together("reading"),
    ):
        raise OSError("gone")
    assert isinstance(told.value.__cause__, OSError)
