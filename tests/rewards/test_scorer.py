"""Test the scorer with well-behaved and hostile rewards in real worker processes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from rlqwen.config import ScoringConfig
from rlqwen.errors import ConfigError, RewardFailure, RewardSpecError
from rlqwen.rewards import Scorer, build_rewards
from rlqwen.types import Completion, Group, Message, Prompt
from tests.patience import PATIENCE_S, wait_until


@pytest.fixture(autouse=True, scope="module")
def _by_value() -> Iterator[None]:
    """Pickle functions of this module by value, so that workers need not import pytest."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def make_group(*texts: str, prompt: str | list[Message] = "2+2=", **columns: Any) -> Group:
    completions = [Completion([ord(letter) for letter in text], [0.0] * len(text), "stop", text) for text in texts]
    return Group(Prompt(7, [1, 2], prompt, columns), completions, policy_version=3)


@contextmanager
def scoring(*functions: str | Callable[..., Any], **options: Any) -> Iterator[Scorer]:
    """Yield a scorer that tolerates every failure by default. A test of a hanging reward sets its own deadline."""
    arguments = {key: options.pop(key) for key in ("weights", "failures_dir") if key in options}
    config = ScoringConfig(**{"timeout": 60.0, "max_failure_share": 1.0, "start_timeout": PATIENCE_S} | options)
    with Scorer(build_rewards(list(functions)), config, **arguments) as scorer:
        yield scorer


def score_letters(sabotage: Callable[[str], Any]) -> Callable[..., list[Any]]:
    """Return a reward: the length of a completion, or `sabotage(text)` if it starts with `bad`."""

    def letters(completions: list[str]) -> list[Any]:
        return [sabotage(text) if text.startswith("bad") else len(text) for text in completions]

    return letters


def workers_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children(recursive=True) if child.is_running()]


def test_rewards_columns_and_weights_reach_the_group() -> None:
    def matches(completions: list[str], solution: list[str], **_: Any) -> list[float]:
        return [float(text == truth) for text, truth in zip(completions, solution, strict=True)]

    def odd(completion_ids: list[list[int]]) -> list[float | None]:
        return [2.0 if len(ids) % 2 else None for ids in completion_ids]

    group = make_group("4", "12", "444", solution="4")
    with scoring(matches, odd, weights=[1.0, 0.25]) as scorer:
        scorer.submit(group)
        assert scorer.wait() == [group]
    assert group.rewards == {"matches": [1.0, 0.0, 0.0], "odd": [2.0, None, 2.0]}
    assert group.call_statuses == {"matches": ["ok"] * 3, "odd": ["ok"] * 3}
    assert group.total_rewards_G == [1.5, 0.0, 0.5]


def test_built_in_rewards_are_told_that_the_template_opened_the_reasoning() -> None:
    group = make_group(
        r"maybe \boxed{4}", r"2+2</think> \boxed{4}", prompt=[{"role": "user", "content": "?"}], solution="4"
    )
    group.prompt.opens_reasoning = True
    with Scorer(build_rewards(["accuracy", "format", "boxed_format"]), ScoringConfig(num_workers=1)) as scorer:
        scorer.score([group])
    assert group.rewards == {"accuracy": [0.0, 1.0], "format": [0.0, 1.0], "boxed_format": [0.0, 1.0]}


def test_the_total_sums_the_rewards_that_apply() -> None:
    def first(completions: list[str]) -> list[float | None]:
        return [None, None]

    def second(completions: list[str]) -> list[float | None]:
        return [None, 3.0]

    group = make_group("a", "b")
    with scoring(first, second) as scorer:
        scorer.score([group])
    assert group.total_rewards_G == [None, 3.0]


def test_conversations_are_passed_as_messages() -> None:
    def echo(prompts: list[Any], completions: list[Any]) -> list[float]:
        assert prompts == [[{"role": "user", "content": "2+2="}]] * 2
        assert completions[1] == [{"role": "assistant", "content": "5"}]
        return [float(turns[0]["content"]) for turns in completions]

    group = make_group("4", "5", prompt=[{"role": "user", "content": "2+2="}])
    with scoring(echo) as scorer:
        scorer.score([group])
    assert group.rewards["echo"] == [4.0, 5.0]


def test_async_rewards_are_awaited() -> None:
    async def slow_length(completions: list[str]) -> list[float]:
        import asyncio

        return await asyncio.gather(*(asyncio.sleep(0.01, float(len(text))) for text in completions))

    group = make_group("a", "bb")
    with scoring(slow_length) as scorer:
        scorer.score([group])
    assert group.rewards["slow_length"] == [1.0, 2.0]


def test_a_reward_may_return_an_array() -> None:
    def as_array(completions: list[str]) -> Any:
        import numpy

        return numpy.array([len(text) for text in completions], dtype=numpy.float32)

    group = make_group("a", "bb")
    with scoring(as_array) as scorer:
        scorer.score([group])
    assert group.rewards["as_array"] == [1.0, 2.0]


def loop_in_python(text: str) -> float:
    while True:
        text = text[::-1]


def loop_in_big_integers(text: str) -> float:
    power: float = 9**9**9
    return power


def loop_in_a_regular_expression(text: str) -> bool:
    return re.fullmatch("(a+)+b", "a" * 60) is not None


@pytest.mark.fault("a reward loops in Python, in C, in a regular expression", "only its sample is missing")
@pytest.mark.parametrize("loop", [loop_in_python, loop_in_big_integers, loop_in_a_regular_expression])
def test_a_call_that_does_not_end_loses_only_its_own_sample(loop: Callable[[str], Any], tmp_path: Path) -> None:
    group, later = make_group("one", "bad", "three"), make_group("last")
    with scoring(score_letters(loop), timeout=2.0, failures_dir=tmp_path) as scorer:
        scorer.score([group, later])
        metrics = scorer.metrics()
    assert group.rewards["letters"] == [3.0, None, 5.0]
    assert group.call_statuses["letters"] == ["ok", "timeout", "ok"]
    assert group.total_rewards_G == [3.0, None, 5.0]
    assert later.rewards["letters"] == [4.0]
    assert metrics["reward/letters/timeout"] == 1
    assert metrics["reward/letters/ok"] == 3
    assert metrics["scoring/restarts"] == 2  # the call of the whole group, then the call of the bad sample
    record = json.loads((tmp_path / "scoring_failures.jsonl").read_text())
    assert f"in {loop.__name__}" in record["traceback"]


def raise_error(text: str) -> float:
    raise KeyError(f"no answer in {text}")


def raise_outside_exception(text: str) -> float:
    class Timeout(BaseException):
        """Derive from BaseException, as math-verify's timeout does."""

    raise Timeout(text)


def leave(text: str) -> float:
    sys.exit(3)


def leave_at_once(text: str) -> float:
    os._exit(3)


def crash(text: str) -> bytes:
    import ctypes

    return ctypes.string_at(0)


def take_memory(text: str) -> float:
    return len(bytearray(5 * 2**30))


def take_memory_bit_by_bit(text: str) -> float:
    taken = []
    while True:
        taken.append(bytearray(2**26))


@pytest.mark.fault(
    "a reward raises, leaves, calls os._exit, segfaults, takes 5 GB",
    "only its sample is missing, and its input is kept",
)
@pytest.mark.parametrize(
    ("sabotage", "sign"),
    [
        (raise_error, "KeyError: 'no answer in bad'"),
        (raise_outside_exception, "Timeout: bad"),
        (leave, "SystemExit: 3"),
        (leave_at_once, "ended itself with exit code 3"),
        (crash, "SIGSEGV"),
        (take_memory, "MemoryError"),
        (take_memory_bit_by_bit, "MemoryError"),
    ],
)
def test_a_call_that_fails_loses_only_its_own_sample(sabotage: Callable[[str], Any], sign: str, tmp_path: Path) -> None:
    group, later = make_group("bad", "three", solution=["x", 1]), make_group("last")
    memory_gib = 0.5 if sabotage is take_memory_bit_by_bit else 4.0
    with scoring(score_letters(sabotage), timeout=10.0, memory_gib=memory_gib, failures_dir=tmp_path) as scorer:
        scorer.score([group, later])
        metrics = scorer.metrics()
    assert group.rewards["letters"] == [None, 5.0]
    assert group.call_statuses["letters"] == ["error", "ok"]
    assert later.rewards["letters"] == [4.0]
    assert metrics["reward/letters/error"] == 1
    record = json.loads((tmp_path / "scoring_failures.jsonl").read_text())
    trace = record.pop("traceback")
    assert sign in trace
    if sabotage is crash:
        assert "in crash" in trace
    assert record == {
        "reward": "letters",
        "outcome": "error",
        "prompt_index": 7,
        "sample": 0,
        "policy_version": 3,
        "prompt": "2+2=",
        "completion": "bad",
        "completion_ids": [98, 97, 100],
        "columns": {"solution": ["x", 1]},
    }


@pytest.mark.fault("a reward returns NaN, inf, a string, a list, an integer beyond floats", "only these are missing")
def test_values_that_are_not_finite_numbers_are_invalid() -> None:
    values = {"bad1": float("nan"), "bad2": float("inf"), "bad3": "1.0", "bad4": [1.0], "bad5": 10**400}
    group = make_group(*values, "good")
    with scoring(score_letters(values.get)) as scorer:
        scorer.score([group])
    assert group.call_statuses["letters"] == ["invalid"] * 5 + ["ok"]
    assert group.rewards["letters"] == [None] * 5 + [4.0]


@pytest.mark.fault("a reward returns too few values", "only the samples that it leaves out are missing")
def test_too_few_values_lose_only_the_samples_that_are_left_out() -> None:
    def forgetful(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions if text != "bad"]

    group = make_group("bad", "good")
    with scoring(forgetful) as scorer:
        scorer.score([group])
    assert group.call_statuses["forgetful"] == ["invalid", "ok"]
    assert group.rewards["forgetful"] == [None, 4.0]


def test_one_number_for_a_group_is_invalid() -> None:
    def scalar(completions: list[str]) -> Any:
        return 1.0

    group = make_group("a", "b")
    with scoring(scalar) as scorer:
        scorer.score([group])
    assert group.call_statuses["scalar"] == ["invalid", "invalid"]


@pytest.mark.fault("a reward fails on most of a batch", "the run stops with the reward's own traceback")
def test_too_many_failures_stop_the_run_with_the_traceback_of_the_reward(tmp_path: Path) -> None:
    group = make_group("bad", "bad2", "good", "fine")
    with scoring(score_letters(raise_error), max_failure_share=0.5, failures_dir=tmp_path) as scorer:
        scorer.score([group])
        assert group.call_statuses["letters"].count("error") == 2
        worse = make_group("bad", "bad2", "bad3", "fine")
        with pytest.raises(RewardFailure) as raised:
            scorer.score([worse])
        scorer.score([again := make_group("fine")])  # the failed batch is discarded
    message = str(raised.value)
    assert "'letters'" in message
    assert "failed on 3 of 4 completions (error 3)" in message
    assert "max_failure_share=0.5" in message
    assert "in raise_error" in message
    assert "KeyError: 'no answer in bad'" in message
    assert "rlqwen/scoring" not in message  # only the reward's own frames
    assert str(tmp_path) in message
    assert again.rewards["letters"] == [4.0]


def test_a_batch_stops_as_soon_as_too_many_failures_are_certain(tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    def hangs(completions: list[str]) -> list[float]:
        with calls.open("a") as file:
            file.write("call\n")
        return [loop_in_python(text) for text in completions]

    hopeless = scoring(hangs, timeout=1.0, max_failure_share=0.0)
    with hopeless as scorer, pytest.raises(RewardFailure, match="timeout 1"):
        scorer.score([make_group(*["bad"] * 20)])
    assert (
        len(calls.read_text().splitlines()) <= 22
    )  # the group, each sample, and one of them again, instead of 41 calls


def test_at_most_200_failures_are_written(tmp_path: Path) -> None:
    with scoring(score_letters(lambda text: float("nan")), failures_dir=tmp_path) as scorer:
        scorer.score([make_group(*["bad"] * 150), make_group(*["bad"] * 150)])
    assert len((tmp_path / "scoring_failures.jsonl").read_text().splitlines()) == 200


def test_submit_returns_at_once_and_scoring_overlaps(tmp_path: Path) -> None:
    """Both calls end before `wait` is called, and neither ends before both were submitted."""

    def obedient(completions: list[str]) -> list[float]:
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        (tmp_path / completions[0]).touch()
        return [1.0] * len(completions)

    with scoring(obedient) as scorer:
        groups = [make_group("a"), make_group("b")]
        for group in groups:
            scorer.submit(group)
        (tmp_path / "go").touch()
        wait_until(lambda: {"a", "b"} <= {path.name for path in tmp_path.iterdir()}, "both calls have been made")
        assert scorer.wait() == groups


def test_several_workers_share_the_calls(tmp_path: Path) -> None:
    def who(completions: list[str]) -> list[float]:
        (tmp_path / str(os.getpid())).touch()
        while len(list(tmp_path.iterdir())) < 2:  # until the other worker has a call, too
            time.sleep(0.01)
        return [float(os.getpid())] * len(completions)

    groups = [make_group("a") for _ in range(6)]
    with scoring(who, num_workers=2) as scorer:
        scorer.wait_until_ready()
        scorer.score(groups)
    pids = {group.rewards["who"][0] for group in groups}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_prints_go_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    def chatty(completions: list[str]) -> list[float]:
        print("hello from", *completions)
        os.write(1, b"straight to the descriptor\n")
        return [1.0] * len(completions)

    group = make_group("here")
    with scoring(chatty) as scorer:
        scorer.score([group])
    captured = capfd.readouterr()
    assert group.rewards["chatty"] == [1.0]
    assert captured.out == ""
    assert "hello from here" in captured.err
    assert "straight to the descriptor" in captured.err


def test_overhead_is_small() -> None:
    def cheap(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    groups = [make_group(*["x" * 200] * 8) for _ in range(100)]
    seconds = []
    with scoring(cheap) as scorer:
        scorer.wait_until_ready()
        for _ in range(3):
            started = time.perf_counter()
            scorer.score(groups)
            seconds.append(time.perf_counter() - started)
    assert min(seconds) < 3.0  # 0.03 s on an idle machine; polling every 50 ms would take 5 s


def test_metrics_count_until_they_are_reset() -> None:
    with scoring(score_letters(raise_error)) as scorer:
        scorer.score([make_group("bad", "good")])
        scorer.score([make_group("good", "fine")])
        counted = scorer.metrics()
        scorer.reset_metrics()
        scorer.score([make_group("good")])
        counted_again = scorer.metrics()
    assert {key: value for key, value in counted.items() if "seconds" not in key} == {
        "reward/letters/ok": 3,
        "reward/letters/timeout": 0,
        "reward/letters/error": 1,
        "reward/letters/invalid": 0,
        "scoring/restarts": 0,
    }
    assert (counted_again["reward/letters/ok"], counted_again["reward/letters/error"]) == (1, 0)


def test_a_reward_that_cannot_be_pickled_runs_in_process_with_a_warning() -> None:
    lock = threading.Lock()

    def locked(completions: list[str]) -> list[float]:
        with lock:
            return [float(os.getpid())] * len(completions)

    group = make_group("a")
    with pytest.warns(UserWarning, match=r"'locked'.*cannot be pickled.*scoring.in_process"), scoring(locked) as scorer:
        scorer.score([group])
    assert group.rewards["locked"] == [float(os.getpid())]


class Curriculum:
    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, completions: list[str]) -> list[float]:
        self.num_calls += 1
        return [float(self.num_calls)] * len(completions)

    def method(self, completions: list[str]) -> list[float]:
        return self(completions)


def test_a_reward_that_keeps_state_runs_in_process_with_a_warning() -> None:
    curriculum, other = Curriculum(), Curriculum()
    group = make_group("a")
    with pytest.warns(UserWarning, match="is called in the trainer's process") as warned:
        scorer = Scorer(build_rewards([curriculum, other.method]), ScoringConfig())
    with scorer:
        scorer.score([group])
    assert len(warned) == 2
    assert curriculum.num_calls == other.num_calls == 1
    assert group.total_rewards_G == [2.0]


def test_in_process_gives_no_warning_and_counts_failures_alike() -> None:
    seen = []

    def stateful(completions: list[str]) -> list[float]:
        seen.extend(completions)
        return [1 / (len(text) - 1) for text in completions]

    group = make_group("a", "bb")
    with scoring(stateful, in_process=["stateful"]) as scorer:
        scorer.score([group])
    assert seen == ["a", "bb", "a", "bb"]  # the group, then sample by sample
    assert group.call_statuses["stateful"] == ["error", "ok"]
    assert group.rewards["stateful"] == [None, 1.0]


def test_ctrl_c_in_an_in_process_reward_is_not_a_failed_call() -> None:
    def interrupted(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with scoring(interrupted, in_process=["interrupted"]) as scorer, pytest.raises(KeyboardInterrupt):
        scorer.score([make_group("a")])


def test_invalid_arguments_of_the_scorer_are_refused() -> None:
    def fine(completions: list[str]) -> list[float]:
        return [1.0]

    with pytest.raises(ConfigError, match="in_process names 'other'"):
        Scorer(build_rewards([fine]), ScoringConfig(in_process=["other"]))
    with pytest.raises(ConfigError, match="2 values for 1 rewards"):
        Scorer(build_rewards([fine]), ScoringConfig(), weights=[1.0, 2.0])
    with pytest.raises(RewardSpecError, match="called 'fine'"):
        Scorer(build_rewards([fine]) * 2, ScoringConfig())


def test_a_function_from_a_file_is_pickled_by_value(tmp_path: Path) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "import os\nSCALE = 3.0\ndef helper(text):\n    return SCALE * len(text)\n"
        "def scaled(completions):\n    assert os.getpid() != " + str(os.getpid()) + "\n"
        "    return [helper(text) for text in completions]\n"
    )
    group = make_group("ab")
    with scoring(f"{file}:scaled") as scorer:
        scorer.score([group])
    assert list(group.rewards.values()) == [[6.0]]


class Unloadable:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (__import__, ("no_such_module_here",))


def test_a_reward_that_a_worker_cannot_load_is_named() -> None:
    missing = Unloadable()

    def needs_more(completions: list[str]) -> list[float]:
        return [float(missing is None)]

    with scoring(needs_more) as scorer, pytest.raises(RewardSpecError) as raised:
        scorer.wait_until_ready()
    assert "'needs_more'" in str(raised.value)
    assert "No module named 'no_such_module_here'" in str(raised.value)
    assert "scoring.in_process" in str(raised.value)


class Deadly(Unloadable):
    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (5,))


class Endless(Unloadable):
    def __reduce__(self) -> tuple[Any, ...]:
        return (time.sleep, (600,))


@pytest.mark.parametrize(
    ("payload", "sign", "start_timeout"),
    [(Deadly(), "exit code 5", PATIENCE_S), (Endless(), "start_timeout=1 s", 1.0)],
)
def test_a_worker_that_does_not_start_stops_the_run(payload: Any, sign: str, start_timeout: float) -> None:
    def heavy(completions: list[str]) -> list[float]:
        return [float(payload is None)]

    with scoring(heavy, start_timeout=start_timeout) as scorer, pytest.raises(RewardFailure, match=sign):
        scorer.score([make_group("a")])


def test_programs_that_a_reward_started_end_at_its_deadline(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def runs_a_program(completions: list[str]) -> list[float]:
        with subprocess.Popen(["sleep", "600"]) as program:
            note.write_text(str(program.pid))
        return [0.0]

    group = make_group("a")
    with scoring(runs_a_program, timeout=3.0) as scorer:
        scorer.score([group])
    assert group.call_statuses["runs_a_program"] == ["timeout"]
    assert not is_running(int(note.read_text()))


def test_close_leaves_no_process_and_may_be_repeated() -> None:
    def letters(completions: list[str]) -> list[float]:
        time.sleep(600)
        return []

    before = {child.pid for child in workers_of(os.getpid())}
    with scoring(letters, num_workers=2, timeout=600) as scorer:
        scorer.wait_until_ready()
        scorer.submit(make_group("a"))  # one worker is busy, one idle
        assert len(workers_of(os.getpid())) >= len(before) + 2
    scorer.close()
    assert {child.pid for child in workers_of(os.getpid())} <= before


def test_submitting_to_a_closed_scorer_raises() -> None:
    def fine(completions: list[str]) -> list[float]:
        return [1.0]

    with scoring(fine) as scorer:
        scorer.wait_until_ready()
    with pytest.raises(RewardFailure, match="closed"):
        scorer.submit(make_group("a"))


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


SCRIPT = """
import os, subprocess, sys, time
from rlqwen.config import ScoringConfig
from rlqwen.rewards import Scorer, build_rewards
from rlqwen.types import Completion, Group, Prompt

print("started", flush=True)

def length(completions):
    if completions[0] == "loop":
        program = subprocess.Popen(["sleep", "600"])
        print("program", program.pid, flush=True)
        return [9**9**9]
    return [float(len(text)) for text in completions]

scorer = Scorer(build_rewards([length]), ScoringConfig(timeout=600, num_workers=2))
group = Group(Prompt(0, [1], "p"), [Completion([1], [0.0], "stop", sys.argv[1])], 0)
scorer.wait_until_ready()
scorer.submit(group)
scorer.wait()
print("total", group.total_rewards_G, flush=True)
"""


def test_a_script_without_a_main_guard_runs_once_and_ends_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, "four"], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert done.stdout == "started\ntotal [4.0]\n"
    assert done.stderr == ""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_trainer(sign: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, script, "loop"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stderr is not None
        program = int(trainer.stderr.readline().split()[1])
        started = [child.pid for child in workers_of(trainer.pid)]
        assert program in started
        assert len(started) >= 5  # two watchdogs, two workers, one program
        trainer.send_signal(sign)
        trainer.wait(timeout=PATIENCE_S)
        wait_until(lambda: not any(map(is_running, started)), "all processes that it started have ended")


def test_the_built_in_accuracy_survives_hostile_answers() -> None:
    group = make_group(r"$\frac{1}{2}$", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}", r"\boxed{0.5}", solution="0.5")
    with scoring("accuracy", timeout=30.0) as scorer:
        scorer.score([group])
    assert group.call_statuses["accuracy"] == ["ok"] * 4  # math-verify's alarms work in a worker's main thread
    assert group.rewards["accuracy"][1:] in ([None, 0.0, 1.0], [0.0, 0.0, 1.0])


def test_the_deadline_ends_math_verify_without_its_alarm() -> None:
    from math_verify import parse, verify  # imported here, so that workers import it before the deadline starts

    def unguarded(completions: list[str]) -> list[float]:
        gold = parse("$0.5$", parsing_timeout=None)
        answers = [parse(text, parsing_timeout=None) for text in completions]
        return [float(verify(gold, answer, timeout_seconds=None)) for answer in answers]

    group = make_group(r"$\boxed{9^{9^{9^{9}}}}$", r"$\frac{1}{2}$")
    with scoring(unguarded, timeout=2.0) as scorer:
        scorer.score([group])
    assert group.call_statuses["unguarded"] == ["timeout", "ok"]
    assert group.rewards["unguarded"] == [None, 1.0]


@pytest.mark.parametrize("in_process", [[], ["talkative"]])
def test_rewards_can_log_and_read_the_trainer_state(in_process: list[str]) -> None:
    def talkative(completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("mean_length", sum(map(len, completions)) / len(completions))
        log_extra("shouted", [text.upper() for text in completions])
        log_extra("odd", [{len(text) % 2 == 1} for text in completions])
        return [float(trainer_state.global_step)] * len(completions)

    class State:
        def __init__(self) -> None:
            self.global_step, self.log_history = 5, [{"loss": 1.0}]

    groups = [make_group("a", "bbb"), make_group("c", "d")]
    with scoring(talkative, in_process=in_process) as scorer:
        scorer.trainer_state = State()
        scorer.score(groups)
        metrics = scorer.metrics()
    assert groups[0].rewards["talkative"] == [5.0, 5.0]
    assert groups[0].extras == {"shouted": ["A", "BBB"], "odd": ["{True}", "{True}"]}
    assert metrics["mean_length"] == 1.5


def test_too_few_logged_values_are_an_error_of_the_call() -> None:
    def sloppy(completions: list[str], **kwargs: Any) -> list[float]:
        kwargs["log_extra"]("one", ["only"])
        return [1.0] * len(completions)

    group = make_group("a", "b")
    with scoring(sloppy) as scorer:
        scorer.score([group])
    assert group.call_statuses["sloppy"] == ["ok", "ok"]  # one value is correct for a call with one sample
    assert group.extras == {"one": ["only", "only"]}
