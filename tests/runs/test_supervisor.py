"""Test the supervisor with small scripts as its child: what it restarts, when it gives up, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlqwen.runs.supervisor import RESTARTS_FILE, RestartPolicy, describe_exit, supervise
from tests.patience import PATIENCE_S, wait_until

QUICK: dict[str, Any] = {"backoff_s": 0.01}


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """Return a function that makes a command, which appends its arguments to the file `starts` and then runs `body`."""
    run = tmp_path / "run"

    def make(body: str) -> tuple[list[str], Path]:
        path = tmp_path / "child.py"
        head = f"""
            import json, os, signal, sys, time
            from pathlib import Path
            run = Path({str(run)!r})
            run.mkdir(exist_ok=True)
            starts = len((run / "starts").read_text().splitlines()) if (run / "starts").exists() else 0
            with (run / "starts").open("a") as file:
                file.write(json.dumps(sys.argv[1:]) + "\\n")
            def log(step):
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(dict(step=step, loss=1.0)) + "\\n")
            def save(step):
                (run / f"checkpoints/step-{{step:06d}}").mkdir(parents=True)
        """
        path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
        return [sys.executable, str(path), "run", "my.yaml"], run

    return make


def starts(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "starts").read_text().splitlines()]


def restarts(run: Path) -> list[Any]:
    path = run / RESTARTS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


DIE = {"raises": "sys.exit(1)", "is killed": "os.kill(os.getpid(), signal.SIGKILL)"}


@pytest.mark.fault(
    "the run dies twice, each time after more steps", "restarted from its last checkpoint until it is finished"
)
@pytest.mark.parametrize("how", DIE)
def test_a_run_that_dies_is_restarted(script: Any, how: str) -> None:
    command, run = script(f"""
        log(10 * starts + 5)
        save(10 * starts + 4)
        if starts < 2:
            {DIE[how]}
    """)
    printed: list[Any] = []
    assert supervise(command, [run], RestartPolicy(3, **QUICK), printed.append) == 0
    assert starts(run) == [["run", "my.yaml"]] + [["run", "my.yaml", "resume=auto"]] * 2
    died = "exit code 1" if how == "raises" else "killed by SIGKILL"
    noted = [{key: line[key] for key in ("restart", "of", "died", "last_step", "start")} for line in restarts(run)]
    assert noted == [
        {"restart": 1, "of": 3, "died": died, "last_step": 5, "start": "from the checkpoint of step 4"},
        {"restart": 2, "of": 3, "died": died, "last_step": 15, "start": "from the checkpoint of step 14"},
    ]
    assert printed[0] == f"the run died: {died}; restart 1 of 3 in 0.01 s, from the checkpoint of step 4"


@pytest.mark.parametrize("code", [0, 2, 75, 130])
def test_finished_refused_and_stopped_runs_are_not_restarted(script: Any, code: int) -> None:
    command, run = script(f"sys.exit({code})")
    assert supervise(command, [run], RestartPolicy(3, **QUICK), print) == code
    assert len(starts(run)) == 1
    assert restarts(run) == []


@pytest.mark.fault(
    "the run dies again and again, each time after more steps", "ends after --max-restarts, with the run's exit code"
)
def test_restarts_are_bounded(script: Any) -> None:
    command, run = script("log(starts)\nsys.exit(1)")
    printed: list[Any] = []
    assert supervise(command, [run], RestartPolicy(4, **QUICK), printed.append) == 1
    assert len(starts(run)) == 5
    assert (
        printed[-1]
        == "the run died: exit code 1; not restarted: it has been restarted as often as --max-restarts=4 allows"
    )


@pytest.mark.fault("the run dies at the same step each time", "ends after the third time, even if restarts are left")
def test_a_run_without_progress_is_given_up(script: Any) -> None:
    command, run = script("log(7)\nos.kill(os.getpid(), signal.SIGSEGV)")
    printed: list[Any] = []
    assert supervise(command, [run], RestartPolicy(50, **QUICK), printed.append) == -signal.SIGSEGV
    assert len(starts(run)) == 3
    assert "3 times in a row at the same step" in printed[-1]


def test_a_run_that_its_monitor_stopped_is_not_restarted(script: Any) -> None:
    command, run = script('(run / "error.log").write_text("rlqwen.errors.WatchStop: kl")\nsys.exit(1)')
    assert supervise(command, [run], RestartPolicy(3, **QUICK), print) == 1
    assert len(starts(run)) == 1


def test_a_restart_is_recorded_in_the_unfinished_run_folder(script: Any, tmp_path: Path) -> None:
    command, run = script("""
        if starts == 0:
            sys.exit(1)
    """)
    done = tmp_path / "first"
    done.mkdir()
    (done / "summary.json").write_text("{}")
    assert supervise(command, [done, run], RestartPolicy(1, **QUICK), print) == 0
    assert len(restarts(run)) == 1
    assert restarts(done) == []


SUPERVISE = """
import sys
from rlqwen.runs.supervisor import RestartPolicy, supervise
sys.exit(supervise(sys.argv[2:], [sys.argv[1]], RestartPolicy(3, backoff_s=float(60)), print))
"""


def start_supervisor(command: Sequence[str], run: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(run), *command],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    wait_until(lambda: (run / "ready").exists() or process.poll() is not None, "the child is ready")
    assert process.poll() is None
    return process


@pytest.mark.fault(
    "a signal to the supervisor", "forwarded once; it ends with the run's exit code and restarts nothing"
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_signals_are_forwarded_once(script: Any, number: int, code: int) -> None:
    command, run = script(f"""
        got = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: got.append(number))
        (run / "ready").touch()
        while not got:
            time.sleep(0.02)
        time.sleep(0.2)
        (run / "got").write_text(json.dumps(got))
        sys.exit({code})
    """)
    process = start_supervisor(command, run)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == code
    assert json.loads((run / "got").read_text()) == [number]
    assert len(starts(run)) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_between_two_attempts_ends_the_supervisor(script: Any, number: int, code: int) -> None:
    command, run = script("(run / 'ready').touch()\nsys.exit(1)")
    process = start_supervisor(command, run)
    wait_until(lambda: restarts(run), "a restart is noted")
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == code
    assert len(starts(run)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only the Linux kernel signals a child when its parent ends")
@pytest.mark.fault("SIGKILL of the supervisor", "the run gets SIGTERM, saves and ends")
def test_no_child_outlives_its_supervisor(script: Any) -> None:
    command, run = script("""
        sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        from rlqwen.runs.supervisor import end_with_supervisor, is_supervised
        assert is_supervised()
        end_with_supervisor()
        def leave(*_):
            (run / "left").touch()
            sys.exit(75)
        signal.signal(signal.SIGTERM, leave)
        (run / "pid").write_text(str(os.getpid()))
        (run / "ready").touch()
        time.sleep(600)
    """)
    process = start_supervisor(command, run)
    process.kill()
    process.wait(PATIENCE_S)
    wait_until((run / "left").exists, "the child leaves")


def test_exit_codes_are_described_in_words() -> None:
    assert describe_exit(-9) == describe_exit(137) == "killed by SIGKILL"
    assert describe_exit(1) == "exit code 1"
    assert os.environ.get("RLQWEN_SUPERVISOR") is None
