"""Memory on a CPU: freed tensors are not mapped anew."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = Path(__file__).parents[2] / "rlqwen" / "distributed" / "device.py"
COUNT_FAULTS = """
import resource, runpy, sys
pick_device = runpy.run_path(sys.argv[1])["pick_device"]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        bytearray(64 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
pick_device(use_cpu=True)
faults()
print(before, faults())
"""


def count_faults(**environment: str) -> tuple[int, int]:
    """Return the page faults of allocating and freeing memory before and after a device is chosen."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, str(MODULE)],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if "MALLOC" not in name} | environment,
    )
    before, after = map(int, done.stdout.split())
    return before, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is tuned")
def test_a_trainer_on_a_cpu_keeps_the_memory_that_it_frees() -> None:
    before, after = count_faults()
    assert before > 8
    assert after < before / 8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is tuned")
def test_malloc_that_the_user_tunes_is_left_alone() -> None:
    before, after = count_faults(MALLOC_TRIM_THRESHOLD_="1000000")
    assert after > before / 2
