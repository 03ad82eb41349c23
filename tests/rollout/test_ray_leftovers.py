"""Leftovers of killed runs are cleared by the next start, and never what a living run uses."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlqwen.errors import RolloutError
from rlqwen.rollout import ray_calls
from rlqwen.rollout import ray_reaper as reaper
from rlqwen.rollout.ray_calls import WatchedProcesses
from rlqwen.rollout.ray_leftovers import claim, clear_leftovers
from tests.narrowing import present
from tests.patience import PATIENCE_S, wait_until

WORKER = """
from multiprocessing import resource_tracker, shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")  # as if the tracker had been killed too
print(memory.name, flush=True)
input()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[Path, "subprocess.Popen[str]", Path]]:
    """Return a private Ray's folder, a process of it, and the shared memory that the process has mapped."""
    folder = tmp_path / "rlq-killed"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=os.environ | {reaper.MARK: str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    segment = Path("/dev/shm") / present(process.stdout).readline().strip()
    assert segment.exists()
    yield folder, process, segment
    process.kill()
    process.communicate()
    segment.unlink(missing_ok=True)


@pytest.mark.fault(
    "SIGKILL of a run and of all that watches it", "the next start ends its processes, and clears memory and folder"
)
def test_the_next_start_clears_what_a_killed_run_left(
    worker: tuple[Path, "subprocess.Popen[str]", Path], tmp_path: Path
) -> None:
    folder, process, segment = worker
    claim(folder).close()  # the kernel lets go of it when the owner is killed
    clear_leftovers(tmp_path)
    assert process.wait(PATIENCE_S) == -9
    assert not segment.exists()
    assert not folder.exists()


def test_shared_memory_is_cleared_if_its_process_died_before(
    worker: tuple[Path, "subprocess.Popen[str]", Path], tmp_path: Path
) -> None:
    folder, process, segment = worker
    claim(folder).close()
    reaper.record_segments(str(folder))
    process.kill()
    process.wait()
    clear_leftovers(tmp_path)
    assert not segment.exists()


@pytest.mark.fault("a run starts beside a living one", "what the living one uses stays")
def test_a_living_run_keeps_everything(worker: tuple[Path, "subprocess.Popen[str]", Path], tmp_path: Path) -> None:
    folder, process, segment = worker
    with claim(folder):
        clear_leftovers(tmp_path)
    young, old, other = (tmp_path / name for name in ("rlq-young", "rlq-old", "else"))
    for each in (young, old, other):
        each.mkdir()
    os.utime(old, (0, time.time() - 3600))
    claim(folder).close()
    (folder / "owner").unlink()  # an instant before the run owns it
    clear_leftovers(tmp_path)
    assert process.poll() is None
    assert segment.exists()
    assert folder.is_dir()
    assert young.is_dir()
    assert other.is_dir()
    assert not old.exists()


def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_a_call_ends_when_a_process_is_killed() -> None:
    process = sleeper()
    watched = WatchedProcesses({process.pid: "raylet"})
    assert watched.call(lambda value: value + 1, 1) == 2
    with pytest.raises(ZeroDivisionError):
        watched.call(lambda: 1 / 0)
    process.kill()
    with pytest.raises(RolloutError, match=rf"Ray's raylet \(process {process.pid}\) is gone"):
        watched.call(time.sleep, PATIENCE_S)
    assert watched.is_lost
    process.communicate()
    with pytest.raises(RolloutError, match="is gone"):
        watched.check()


def test_processes_that_end_because_they_are_told_to_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_calls, "CLOSE_S", 1.0)
    process = sleeper()
    watched = WatchedProcesses({process.pid: "raylet"})

    def shutdown() -> None:
        process.communicate()
        time.sleep(3 * ray_calls._POLL_S)  # Ray goes on after its processes have ended

    watched.close(shutdown)
    assert not watched.is_lost
    with pytest.raises(RolloutError, match=r"did not end within 1 s"):
        watched.close(lambda: time.sleep(PATIENCE_S))


def test_a_call_that_hangs_ends_when_a_process_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_calls, "STOPPED_S", 0.5)
    process = sleeper()
    watched = WatchedProcesses({process.pid: "gcs_server"})
    process.send_signal(19)
    wait_until(lambda: ray_calls._state(process.pid) == "T", "it is stopped")
    watched.check()
    with pytest.raises(RolloutError, match=r"has been stopped by a signal for 0\.5 s"):
        watched.call(time.sleep, PATIENCE_S)
    process.kill()
    process.communicate()


DESTRUCTOR_THAT_CRASHES = """
import ctypes, sys
from rlqwen.rollout.ray_calls import leave_without_destructors

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # registered earlier, as what Ray's threads still use
leave_without_destructors()
libc.printf(b"from C; ")
sys.stdout.write("from Python")
sys.exit(7)
"""


def test_a_process_whose_destructors_crash_keeps_its_exit_code() -> None:
    command = [sys.executable, "-c", DESTRUCTOR_THAT_CRASHES]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 7, ended.stderr
    assert "from C; " in ended.stdout
    assert "from Python" in ended.stdout


def test_a_server_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_calls, "SILENT_S", 0.3)
    monkeypatch.setattr(ray_calls, "ASK_S", 0.05)
    answers = threading.Event()

    def ask() -> None:
        if not answers.is_set():
            raise ConnectionError("nobody listens")

    answers.set()
    watched = WatchedProcesses({}, ask)
    watched.call(time.sleep, 1.0)
    answers.clear()
    with pytest.raises(RolloutError, match=r"gcs_server has not answered for 0\.3 s"):
        watched.call(time.sleep, PATIENCE_S)
    watched.end()
