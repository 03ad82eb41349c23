"""Runs a function in several ranks over gloo, forked, so that nothing is imported again."""

import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.patience import PATIENCE_S


def run_ranks(function: Callable[[], Any], *, world_size: int = 2, deadline_s: float = PATIENCE_S) -> list[Any]:
    """Call `function` in every rank as a launcher would have it; returns what each gave, by rank.

    Raises AssertionError with a rank's traceback where one fails, and ends the others; so it does at the deadline.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pids = {_fork(function, rank, world_size, port, Path(folder)): rank for rank in range(world_size)}
        until, failure = time.monotonic() + deadline_s, ""
        while pids and not failure:
            for pid, rank in list(pids.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del pids[pid]
                    if code := os.waitstatus_to_exitcode(status):
                        failure = f"rank {rank} ended with {code}: {_read(Path(folder) / f'{rank}.error')}"
            if pids and time.monotonic() > until:
                failure = failure or f"ranks {sorted(pids.values())} were not done after {deadline_s} s"
            time.sleep(0.01)
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        assert not failure, failure
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _fork(function: Callable[[], Any], rank: int, world_size: int, port: int, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
        (folder / str(rank)).write_bytes(pickle.dumps(function()))
        code = 0
    except BaseException:  # noqa: BLE001 - the child must never return into pytest
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else "no traceback"
