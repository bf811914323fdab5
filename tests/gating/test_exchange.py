"""Expert parallelism over real processes; what they check is in ranks_exchange.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bigvision.gating import expert_range

LIMIT = 240  # seconds, of four processes on a busy machine


def run_ranks(scenario: str, folder: Path) -> None:
    """Run a scenario in its own session, so that a hang ends with all of its processes."""
    script = Path(__file__).with_name("ranks_exchange.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), scenario, str(folder)]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{scenario}: ranks still waiting after {LIMIT} s\n{process.communicate()[0]}")
    assert process.returncode == 0, output


def test_exchanges_over_1_2_and_4_ranks_equal_one_process(tmp_path: Path) -> None:
    run_ranks("exchange", tmp_path)


def test_a_checkpoint_of_4_ranks_loads_on_3_2_and_1(tmp_path: Path) -> None:
    run_ranks("checkpoint", tmp_path)


@pytest.mark.parametrize("num_experts", [0, 1, 3, 4, 7, 1000])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_experts_are_shared_out_in_blocks(num_experts: int, world: int) -> None:
    ranges = [expert_range(num_experts, rank, world) for rank in range(world)]
    assert [i for own in ranges for i in own] == list(range(num_experts))
    sizes = [len(own) for own in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_outside_of_its_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        expert_range(4, 2, 2)
