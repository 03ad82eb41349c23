"""Start the ranks of a run on this machine, and end them together.

On several machines use torchrun, which gives the ranks the same environment.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rlqwen.runs.supervisor import SUPERVISED, describe_exit
from rlqwen.terminal import echo

MAX_EXIT_S = 20.0
"""Seconds that ranks have to end by themselves after one has failed, or after Ctrl-C; then they are killed."""
LEAVE_S = 10.0
"""Seconds that the other ranks have to leave by themselves after one has saved and left."""
_POLL_S = 0.05
_SHOWN = 20_000
"""Characters of a failed rank's output that are shown, from the end."""
_LEAVING = (75, 130)
"""Exit codes of a rank that was asked to leave: the others were asked too, and are saving."""
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def is_rank() -> bool:
    """Return whether a launcher has started this process."""
    return "RANK" in os.environ


def launch_command_line(arguments: Sequence[str], num_ranks: int) -> int:
    """Run rlqwen in `num_ranks` ranks with the arguments that it was started with; returns the exit code."""
    return launch([sys.executable, "-P", "-m", "rlqwen", *arguments], num_ranks)


def launch(command: Sequence[str], num_ranks: int) -> int:
    """Run `command` in ranks to its end; returns the exit code of the first that failed, as a shell would give it.

    The output of the main rank is shown as it comes, that of another rank if it fails. A rank that fails ends the
    others. Signals are passed on to all; if this process is killed, the ranks get SIGTERM, on which a run saves and leaves.
    """
    with tempfile.TemporaryDirectory(prefix="rlqwen-ranks-") as folder:
        ranks = _Ranks(command, num_ranks, Path(folder))
        heard = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]  # by nohup, say
        before = {number: signal.signal(number, ranks.pass_on) for number in heard}
        try:
            ranks.start()
            code = ranks.wait()
        finally:
            ranks.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


class _Ranks:
    def __init__(self, command: Sequence[str], num_ranks: int, folder: Path) -> None:
        self.command, self.num_ranks, self.folder = list(command), num_ranks, folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked_to_stop = 0

    def start(self) -> None:
        shared = {
            SUPERVISED: str(os.getpid()),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.num_ranks))}
        for rank in range(self.num_ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = threads | dict(os.environ) | shared | own
            if rank == 0:
                process = subprocess.Popen(self.command, env=environment, process_group=0)
            else:
                with self._output(rank).open("wb") as file:
                    process = subprocess.Popen(
                        self.command, env=environment, process_group=0,
                        stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    )  # fmt: skip
            self.processes.append(process)

    def wait(self) -> int:
        """Wait until all ranks have ended; return the exit code of the first that failed, or 0."""
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                break
            if all(code == 0 for code in codes):
                return 0
            time.sleep(_POLL_S)
        # If several ended since the last look, one that was killed or crashed comes before one that only left.
        first = min(failed, key=lambda rank: (codes[rank] in _LEAVING, (codes[rank] or 0) > 0, rank))
        code = codes[first]
        assert code is not None
        if code not in _LEAVING or not self._wait_for_all(LEAVE_S):
            self._report(first, code)
            self.end()
        return code

    def _report(self, rank: int, code: int) -> None:
        if self.asked_to_stop:
            return
        if rank:
            output = self._output(rank).read_bytes()[-_SHOWN:].decode("utf-8", "replace").rstrip()
            echo(output, err=True)
        if rank or code < 0:
            whose = f"rank {rank} of {self.num_ranks}"
            echo(f"rlqwen: {whose} ended first: {describe_exit(code)}; ending the others", err=True)

    def end(self) -> None:
        """End the ranks that live, at once if they can: without the one that failed nothing can be saved."""
        for _ in range(2):  # the first signal asks a run to save after the update, the second to leave now
            self._send(signal.SIGTERM)
            if self._wait_for_all(1.0):
                return
        self._wait_for_all(MAX_EXIT_S)

    def kill(self) -> None:
        """Kill the ranks that still live."""
        self._send(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_stop = number
        self._send(signal.Signals(number))

    def _send(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _wait_for_all(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _output(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
