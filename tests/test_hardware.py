"""What is said of the processor against what the kernel says of it."""

from pathlib import Path

import pytest

from bigvision.hardware import has_fast_bfloat16

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="no /proc/cpuinfo on this system")
def test_bfloat16_is_fast_where_the_processor_lists_its_instructions() -> None:
    flags = {
        word for line in CPUINFO.read_text().splitlines() if line.startswith("flags") for word in line.split()
    }
    if not flags:
        pytest.skip("no flags of an x86 processor in /proc/cpuinfo")
    assert has_fast_bfloat16("cpu") == bool(flags & {"avx512_bf16", "amx_bf16"})
