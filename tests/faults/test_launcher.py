"""Inject faults into ranks of `--nproc-per-node`: if one rank dies, the others end and its error is shown first."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlqwen.runs.launch import launch
from tests.patience import PATIENCE_S

PROGRAM = """
import os, signal, sys, time
import torch.distributed as dist
from rlqwen.distributed import Ranks
ranks = Ranks()
ranks.barrier()
if ranks.rank == 1:
    {fault}
from rlqwen.cli.session import wait_for_cause
try:
    ranks.barrier()
except Exception as error:
    wait_for_cause(error)
    print("the error of rank", ranks.rank, file=sys.stderr)
    raise
time.sleep(1000)
"""
DEADLINE_S = PATIENCE_S


def run(fault: str, capfd: pytest.CaptureFixture[str], num_ranks: int = 2) -> tuple[int, str]:
    started = time.monotonic()
    code = launch([sys.executable, "-c", PROGRAM.format(fault=fault)], num_ranks)
    assert time.monotonic() - started < DEADLINE_S
    return code, capfd.readouterr().err


@pytest.mark.slow_fault
@pytest.mark.fault("a rank raises", "the others end soon; its error alone is shown")
def test_a_rank_that_raises_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    code, shown = run("sys.exit('rank 1 has found a fault') or None", capfd)
    assert code == 1
    assert shown.index("rank 1 has found a fault") >= 0
    assert "the error of rank 0" not in shown
    assert "rank 1 of 2 ended first: exit code 1; ending the others" in shown


@pytest.mark.slow_fault
@pytest.mark.fault("SIGKILL of a rank", "the others end soon; the signal is named")
def test_a_rank_that_is_killed_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    code, shown = run("os.kill(os.getpid(), signal.SIGKILL)", capfd)
    assert code == 128 + signal.SIGKILL
    assert "rank 1 of 2 ended first: killed by SIGKILL" in shown
    assert "the error of rank 0" not in shown


@pytest.mark.slow_fault
@pytest.mark.fault("SIGKILL of the launcher of ranks", "the ranks end: no orphans")
def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    child = (
        "import os, sys, time; from rlqwen.runs.supervisor import end_with_supervisor; end_with_supervisor();"
        "open(os.path.join(sys.argv[1], os.environ['RANK']), 'w').write(str(os.getpid())); time.sleep(1000)"
    )
    code = f"import sys; from rlqwen.runs.launch import launch; launch([sys.executable, '-c', {child!r}, {str(tmp_path)!r}], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + DEADLINE_S
    while len([path for path in tmp_path.iterdir() if path.read_text()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    for path in tmp_path.iterdir():
        while alive(int(path.read_text())):
            assert time.monotonic() < deadline, "a rank outlived its launcher"
            time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
