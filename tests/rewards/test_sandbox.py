"""Test the sandbox of reward workers from inside."""

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from rlqwen.config import ScoringConfig
from rlqwen.errors import ConfigError
from rlqwen.rewards import Scorer, build_rewards
from rlqwen.rewards.failure_log import FILE_NAME
from rlqwen.rewards.sandbox import sandbox
from rlqwen.rewards.sandbox.syscalls import CALLS
from tests.patience import PATIENCE_S
from tests.rewards.test_scorer import make_group, scoring, workers_of


@pytest.fixture(autouse=True, scope="module")
def _by_value() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def attempt(act: Callable[[], Any]) -> float:
    """Return 1 if the act succeeded, 0 if it was refused."""
    try:
        act()
    except (OSError, KeyError):
        return 0.0
    return 1.0


def test_only_the_isolated_reward_is_denied_network_files_environment_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setenv("RLQWEN_TEST_SETTING", "plain")
    data = tmp_path / "data.jsonl"
    data.write_text("42")
    trainer = os.getpid()

    def acts(completions: list[str]) -> list[float]:
        return [
            attempt(lambda: socket.socket(socket.AF_INET).close()),
            attempt(lambda: (tmp_path / "x").write_text("x")),
            attempt(lambda: os.environ["RLQWEN_TEST_SETTING"]),
            attempt(data.read_text),
            attempt(lambda: os.kill(trainer, 0)),
            attempt(lambda: Path(f"/proc/{trainer}/environ").read_bytes()),
            attempt(lambda: subprocess.run(["/bin/sh", "-c", f"cat {data}"], check=False).check_returncode())
            if subprocess.run(["/bin/sh", "-c", f"cat {data}"], check=False, capture_output=True).returncode == 0
            else 0.0,
            attempt(lambda: subprocess.run(["/bin/true"], check=True)),
        ]

    def ordinary(completions: list[str]) -> list[float]:
        return acts(completions)

    group = make_group(*"abcdefgh")
    with scoring(acts, ordinary, isolated=["acts"], timeout=60.0) as scorer:
        scorer.score([group])
    assert group.rewards["acts"] == [0.0] * 7 + [1.0]
    assert group.rewards["ordinary"] == [1.0] * 8


def test_a_reward_can_require_isolation_and_the_config_can_switch_it_off() -> None:
    def nosy(completions: list[str]) -> list[float]:
        return [float("PYTHONPATH" in os.environ)] * len(completions)

    nosy.isolated = True  # type: ignore[attr-defined]
    for isolation, seen in (("required", 0.0), ("off", 1.0)):
        group = make_group("a")
        os.environ.setdefault("PYTHONPATH", "/nowhere")
        with scoring(nosy, isolation=isolation, timeout=60.0) as scorer:
            scorer.score([group])
        assert group.rewards["nosy"] == [seen]


def test_async_rewards_and_numpy_work_isolated() -> None:
    async def mean(completions: list[str]) -> list[float]:
        import asyncio

        import numpy

        await asyncio.sleep(0.001)
        return [float(numpy.linalg.norm(numpy.array([3.0, 4.0])))] * len(completions)

    group = make_group("a", "b")
    with scoring(mean, isolated=["mean"], timeout=60.0) as scorer:
        scorer.score([group])
    assert group.rewards["mean"] == [5.0, 5.0]


def fork(text: str) -> None:
    os.fork()


def bomb(text: str) -> None:
    """Start two processes that each start two, up to 256."""
    code = (
        "import subprocess, sys, time\n"
        "if int(sys.argv[2]): [subprocess.Popen([sys.executable, '-Sc', sys.argv[1], sys.argv[1], "
        "str(int(sys.argv[2]) - 1)]) for _ in range(2)]\n"
        "time.sleep(600)"
    )
    subprocess.run([sys.executable, "-Sc", code, code, "8"], check=False)


def shared_memory(text: str) -> None:
    import mmap

    mmap.mmap(-1, 5 << 30).write(b"x" * (5 << 30))


def many_that_take_memory(text: str) -> None:
    code = "import time; taken = bytearray(b'x') * (100 << 20); time.sleep(600)"
    for started in [subprocess.Popen([sys.executable, "-Sc", code]) for _ in range(8)]:
        started.wait()


@pytest.mark.fault("an isolated reward that forks without end, or whose processes take more than their memory", "ended")
@pytest.mark.parametrize(
    ("act", "sign"),
    [
        (fork, "Operation not permitted"),
        pytest.param(bomb, "may have 32 processes", marks=pytest.mark.slow_fault),
        pytest.param(shared_memory, "Error", marks=pytest.mark.slow_fault),
        pytest.param(many_that_take_memory, "GiB together", marks=pytest.mark.slow_fault),
    ],
)
def test_limits_include_all_processes_of_an_isolated_reward(
    act: Callable[[str], None], sign: str, tmp_path: Path
) -> None:
    def letters(completions: list[str]) -> list[float]:
        return [act(text) or 1.0 if text == "bad" else 1.0 for text in completions]  # type: ignore[func-returns-value]

    group, before = make_group("bad"), len(workers_of(os.getpid()))
    with scoring(letters, isolated=["letters"], timeout=60.0, memory_gib=0.5, failures_dir=tmp_path) as scorer:
        scorer.score([group])
        assert group.call_statuses["letters"] == ["error"]
        assert sign in (tmp_path / FILE_NAME).read_text()
        assert len(workers_of(os.getpid())) <= before + 2
        scorer.score([after := make_group("good")])
    assert after.rewards["letters"] == [1.0]


@pytest.mark.fault("hostile code in a reward worker answers the trainer with a pickle", "not unpickled")
def test_a_pickle_from_a_worker_is_not_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {marker}",))

    message = cloudpickle.dumps(("result", Bomb()))

    def answers(completions: list[str]) -> list[float]:
        for fd in range(3, 4096):
            try:
                os.write(fd, len(message).to_bytes(4, "big") + message)
            except OSError:
                continue
        return [1.0] * len(completions)

    group = make_group("a")
    with scoring(answers, timeout=60.0) as scorer:
        scorer.score([group])
    assert group.call_statuses["answers"] == ["error"]
    assert not marker.exists()


def test_processor_time_per_call_is_limited() -> None:
    def burns(completions: list[str]) -> list[float]:
        while completions == ["bad"]:
            pass
        return [1.0]

    bad, good = make_group("bad"), make_group("good")
    with scoring(burns, timeout=2 * PATIENCE_S, cpu_seconds=1.0) as scorer:
        started = time.monotonic()
        scorer.score([bad, good])
    assert bad.call_statuses["burns"] == ["timeout"]
    assert good.rewards["burns"] == [1.0]
    assert time.monotonic() - started < PATIENCE_S  # ended before its deadline


def test_a_reward_that_requires_isolation_never_runs_in_the_trainer() -> None:
    class Stateful:
        isolated = True

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, completions: list[str]) -> list[float]:
            return [1.0]

    with pytest.raises(ValueError, match="must run isolated, and cannot go to a worker"):
        Scorer(build_rewards([Stateful()]), ScoringConfig())
    with pytest.raises(ConfigError, match="in_process names 'Stateful'"):
        Scorer(build_rewards([Stateful()]), ScoringConfig(in_process=["Stateful"]))
    with pytest.raises(ConfigError, match=r"scoring.isolated names 'other'"):
        Scorer(build_rewards([len_of]), ScoringConfig(isolated=["other"]))


def len_of(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_this_machine_can_isolate_workers() -> None:
    assert sandbox.unavailable_reason() is None


def test_a_sandbox_that_does_not_hold_is_detected() -> None:
    with pytest.raises(OSError, match="does not hold: a file was written"):
        sandbox._test(os.getpid())


@pytest.mark.fault("a kernel without Landlock, and a reward that must run isolated", "refused, with what to do")
def test_a_reward_that_requires_isolation_is_refused_without_landlock() -> None:
    """A seccomp filter removes Landlock from a process and from the workers that it starts."""
    script = """
        from rlqwen.config import ScoringConfig
        from rlqwen.errors import RewardSpecError
        from rlqwen.rewards import Scorer, build_rewards
        from rlqwen.rewards.sandbox import sandbox, seccomp

        def one(completions): return [1.0] * len(completions)
        one.isolated = True
        seccomp.forbid_new_privileges()
        seccomp.install(seccomp._program([(0x15, 0, 1, 444), (0x06, 0, 0, 0x50000 | 38)]))
        try:
            with Scorer(build_rewards([one]), ScoringConfig()) as scorer: scorer.wait_until_ready()
        except RewardSpecError as error: print(error)
        print("probe:", sandbox.unavailable_reason())
        with Scorer(build_rewards([one]), ScoringConfig(isolation="off")) as scorer: scorer.wait_until_ready()
        print("off is ready")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert "'one'" in result.stdout
    assert "must run isolated" in result.stdout
    assert "scoring.isolation: off" in result.stdout
    assert "does not allow: Landlock: " in result.stdout
    assert "probe: Landlock: " in result.stdout
    assert result.stdout.endswith("off is ready\n")


OLD_KERNEL = """
import os, sys
from rlqwen.rewards.sandbox import sandbox, landlock
landlock.version = lambda: int(sys.argv[1])
trainer = os.getpid()
if os.fork() == 0:
    sandbox.isolate(trainer)
    for flags in (os.O_RDONLY | os.O_TRUNC, os.O_WRONLY, os.O_RDWR):
        for path in (sys.argv[2], sys.executable):
            try: os.open(path, flags)
            except OSError: continue
            os._exit(1)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_the_sandbox_holds_on_older_kernels(version: int, tmp_path: Path) -> None:
    """Use only the Landlock features of an older version; seccomp must do the rest."""
    file = tmp_path / "precious"
    file.write_text("kept")
    command = [sys.executable, "-c", OLD_KERNEL, str(version), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert file.read_text() == "kept"


HEADERS = {0: "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 1: "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("column", HEADERS, ids=["x86_64", "aarch64"])
def test_system_call_numbers_match_the_kernel_headers(column: int) -> None:
    header = Path(HEADERS[column])
    if not header.is_file():
        pytest.skip(f"the kernel's headers are not installed ({header})")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    numbers = {name: int(number) for name, number in defined}
    ours = {name: pair[column] for name, pair in CALLS.items()}
    known = {name: number for name, number in ours.items() if name in numbers}
    assert len(known) > 90
    assert {name: number for name, number in known.items() if number != numbers[name]} == {}
    assert [name for name in numbers if name in ours and ours[name] is None] == []
