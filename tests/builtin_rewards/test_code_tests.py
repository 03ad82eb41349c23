"""Test `code_tests` with correct, wrong and hostile code in real isolated workers."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rlqwen_rewards.case_runner import run_cases, same_text
from rlqwen_rewards.code_cases import FunctionCall, Program, Statements, parse_cases
from rlqwen_rewards.code_tests import CodeTests, code_of
from rlqwen_rewards.confined.judge import same_value
from rlqwen_rewards.confined_process import Limits

from rlqwen.config import ScoringConfig
from rlqwen.rewards import Scorer, build_rewards
from rlqwen.types import Completion, Group, Prompt
from tests.patience import PATIENCE_S

REWARD = "rlqwen_rewards.code_tests:CodeTests"
ASSERTS = ["assert double(2) == 4", "assert double([1]) == [1, 1]", "assert double('ab') == 'abab'"]


def scorer_with(timeout: float) -> Scorer:
    """Return a scorer; `timeout` is in seconds per test of a completion."""
    rewards = build_rewards([REWARD], [{"all_or_nothing": False, "timeout": timeout}])
    return Scorer(rewards, ScoringConfig(timeout=PATIENCE_S, max_failure_share=1.0))


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with scorer_with(timeout=60.0) as scorer:
        yield scorer


@pytest.fixture
def impatient_scorer() -> Iterator[Scorer]:
    with scorer_with(timeout=2.0) as scorer:
        yield scorer


def score(scorer: Scorer, *codes: str, prompt: Any = "Write it.", **columns: Any) -> list[float | None]:
    completions = [Completion([1], [0.0], "stop", code) for code in codes]
    group = Group(Prompt(0, [1], prompt, columns), completions, policy_version=0)
    scorer.score([group])
    assert group.call_statuses["CodeTests"] == ["ok"] * len(codes), group.call_statuses
    return group.rewards["CodeTests"]


def test_the_reward_is_the_share_of_assertions_that_hold(scorer: Scorer) -> None:
    right = "Sure:\n```python\ndef double(x):\n    return x + x\n```\nDone."
    half = "```python\ndef double(x):\n    return 2 * x if isinstance(x, int) else x\n```"
    thinking = f"<think>```python\nnonsense(\n```</think>{right}"
    broken = "```python\ndef double(x:\n```"
    assert score(scorer, right, half, thinking, broken, "no code", test_list=ASSERTS) == [1.0, 1 / 3, 1.0, 0.0, 0.0]


def test_humaneval_tests_call_the_entry_point_and_code_may_continue_the_prompt(scorer: Scorer) -> None:
    test = "def check(candidate):\n    for i in range(5):\n        assert candidate(i) == i * i, 'no square'\n"
    prompt = 'def square(x):\n    """x times x"""\n'
    rewards = score(
        scorer, "    return x * x\n", "    return x + x\n", f"```python\n{prompt}    return x ** 2\n```",
        prompt=prompt, test=test, entry_point="square",
    )  # fmt: skip
    assert rewards == [1.0, 0.0, 1.0]


def test_programs_get_input_and_their_output_is_compared(scorer: Scorer) -> None:
    tests = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
    add = "a, b = map(int, input().split())\nprint(a + b)\n"
    leave = f"import sys\n{add}sys.exit(0)\n"
    fail = f"import sys\n{add}sys.exit(3)\n"
    assert score(scorer, add, leave, fail, "print(3)", input_output=tests) == [1.0, 1.0, 0.0, 0.5]


def test_functions_are_found_in_the_module_or_in_class_solution(scorer: Scorer) -> None:
    tests = {"fn_name": "pair", "inputs": [[1, 2], [3, 4]], "outputs": [[[2, 1]], [[4, 3]]]}
    plain = "def pair(a, b):\n    return b, a\n"
    method = "class Solution:\n    def pair(self, a, b):\n        return [b, a]\n"
    assert score(scorer, plain, method, "def other(): ...", tests=tests) == [1.0, 1.0, 0.0]


def test_tests_can_use_objects_of_classes_that_the_code_defines(scorer: Scorer) -> None:
    code = (
        "class Pair:\n    def __init__(self, a, b=0): self.a, self.b = a, b\n    def swap(self): return self.b, self.a\n"
        "def total(pairs): return sum(p.a + p.b for p in pairs)\n"
    )
    tests = ["p = Pair(1, b=2)\nassert p.swap() == (2, 1)", "p = Pair(1)\np.b = 5\nassert total([p, Pair(2)]) == 8"]
    assert score(scorer, code, test_list=tests) == [1.0]


def test_a_row_without_tests_gives_none(scorer: Scorer) -> None:
    assert score(scorer, "print(1)", test_list=[]) == [None]


HONEST = "def double(x): return x + x\n"
CHEATS = {
    "equal to all": "class A:\n    def __eq__(self, o): return True\ndef double(x): return A()",
    "int equal to all": "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = None\ndef double(x): return A()",
    "str equal to all": "class A(str):\n    def __eq__(self, o): return True\ndef double(x): return A()",
    "list equal to all": "class A(list):\n    def __eq__(self, o): return True\ndef double(x): return A()",
    "early exit": "import sys; sys.exit(0)",
    "hard exit": "import os; os._exit(0)",
    "exit in the call": "def double(x): raise SystemExit(0)",
    "hard exit in the call": "import os\ndef double(x): os._exit(0)",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)",
    "builtins": "import builtins\nbuiltins.AssertionError = type('X', (BaseException,), {})\n"
    "builtins.isinstance = lambda *_: True\ndef double(x): return 0",
    "frames": "import sys\ndef double(x):\n    frame = sys._getframe()\n    while frame:\n        for v in "
    "frame.f_locals.values():\n            if isinstance(v, str) and '== 4' in v: return 4\n"
    "        frame = frame.f_back\n",
    "garbage": "import gc\ndef double(x):\n    return [o for o in gc.get_objects() if 'assert' in repr(o)][0]",
    "replies": "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'[\"value\", true]\\n' * 9)\n"
    "    except OSError: pass\nos._exit(0)",
    "nothing": "",
    "assert off": "import sys\nsys.flags = None\ndef double(x): raise AssertionError",
    "stop the test": "def double(x): raise StopIteration",
    "keyboard": "def double(x): raise KeyboardInterrupt",
    "prints": "print('[\"value\", null]')\nprint('OK', 'passed', 1.0)",
}


@pytest.mark.fault("a completion that cheats its tests: ends early, overrides equality, looks for the results", "0")
def test_code_that_cheats_is_not_rewarded(scorer: Scorer) -> None:
    assert score(scorer, HONEST, *CHEATS.values(), test_list=ASSERTS[:1]) == [1.0] + [0.0] * len(CHEATS)


DENIED = {
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 22), 0.2)",
    "local socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "write": "open('/tmp/rlqwen-code-tests', 'w')",
    "shared memory": "open('/dev/shm/rlqwen-code-tests', 'w')",
    "memory file": "import os\nos.memfd_create('x')",
    "home": "import os\nos.listdir(os.path.expanduser('~root'))",
    "data": "open({data!r}).read()",
    "repository": "open({source!r}).read()",
    "environment of the parent": "import os\nopen(f'/proc/{{os.getppid()}}/environ').read()",
    "memory of the parent": "import os\nopen(f'/proc/{{os.getppid()}}/mem').read()",
    "own memory": "open('/proc/self/maps').read()",
    "secret": "import os\nos.environ['CANARY_TOKEN']",
    "fork": "import os\nos.fork()",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "program": "import subprocess\nsubprocess.run(['/bin/true'])",
    "exec": "import os\nos.execv('/bin/true', ['/bin/true'])",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill the group": "import os\nos.kill(0, 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "trace": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.ptrace(16, os.getppid(), 0, 0): raise OSError(ctypes.get_errno())",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "kernel's queue": "import ctypes\nif ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)) < 0: raise OSError",
    "another machine's calls": "import ctypes\nif ctypes.CDLL(None).syscall(0x40000029, 2, 1, 0) < 0: raise OSError",
    "rename": "import os\nos.rename({data!r}, {data!r} + '2')",
    "mode": "import os\nos.chmod({data!r}, 0o777)",
    "namespace": "import os\nimport ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError",
}


@pytest.mark.fault("a completion that reaches for network, files, secrets, other processes", "refused; it sees nothing")
def test_the_sandbox_denies_files_network_processes_and_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt prints whether it succeeded; all must be refused, and the worker must continue."""
    monkeypatch.setenv("CANARY_TOKEN", "canary-value-1234")
    data = tmp_path / "answers.jsonl"
    data.write_text("42")
    programs = []
    for attempt in DENIED.values():
        body = attempt.format(data=str(data), source=str(Path(__file__).parents[2] / "rlqwen" / "errors.py"))
        inner = "\n".join(f"    {line}" for line in body.splitlines())
        programs.append(
            f"try:\n{inner}\nexcept (OSError, KeyError, RuntimeError, ValueError):\n    print('no')\nelse: print('YES')\n"
        )
    with Scorer(build_rewards([REWARD]), ScoringConfig(timeout=30.0)) as scorer:
        *rewards, control = score(scorer, *programs, "print('YES')", tests=[{"input": "", "output": "no"}])
    assert control == 0.0
    assert {name for name, reward in zip(DENIED, rewards, strict=True) if reward != 1.0} == set()
    assert data.read_text() == "42"


HARMFUL_TESTS = DENIED | {
    "kill a stranger": "import os\nos.kill({stranger}, 9)",
    "have the kernel signal a stranger": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, {stranger})",
    "hold the connection with the trainer": "import os, stat\ndef is_socket(fd):\n    try: return stat.S_ISSOCK(os.fstat(fd).st_mode)"
    "\n    except OSError: return False\nif not any(map(is_socket, range(256))): raise OSError",
}


@pytest.mark.fault(
    "a dataset's tests reach for network, files, secrets, processes, the trainer", "refused, as for a completion"
)
def test_the_tests_of_a_dataset_are_confined_as_the_code_is(scorer: Scorer, tmp_path: Path) -> None:
    """Each test passes if its attempt is refused."""
    data = tmp_path / "answers.jsonl"
    data.write_text("42")
    stranger = subprocess.Popen(["/bin/sleep", "600"])
    tests = []
    for attempt in HARMFUL_TESTS.values():
        source = str(Path(__file__).parents[2] / "rlqwen" / "errors.py")
        body = attempt.format(data=str(data), source=source, stranger=stranger.pid)
        inner = "\n".join(f"    {line}" for line in body.splitlines())
        tests.append(f"try:\n{inner}\nexcept (OSError, KeyError, RuntimeError, ValueError): pass\nelse: assert False\n")
    try:
        assert score(scorer, HONEST, tests=tests) == [1.0]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    assert data.read_text() == "42"


@pytest.mark.fault("a dataset's tests hang, end their process, crash it, claim results", "that row's reward, in time")
def test_tests_that_misbehave_decide_their_own_row_only(impatient_scorer: Scorer) -> None:
    rows = ["while True: pass", "import os; os._exit(0)", "raise SystemExit", "import ctypes; ctypes.string_at(0)"]
    rows += ["import signal, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(1000)"]
    started = time.monotonic()
    for row in rows:
        assert score(impatient_scorer, HONEST, test_list=[row, "assert double(2) == 4"]) == [0.0], row
    assert score(impatient_scorer, HONEST, test_list=ASSERTS) == [1.0]
    assert time.monotonic() - started < PATIENCE_S
    assert impatient_scorer.metrics()["scoring/restarts"] == 0


@pytest.mark.fault(
    "a completion returns 150,000 integers of one hash, as set and dict", "0 at the deadline of its test"
)
@pytest.mark.parametrize("kind", ["set", "dict"])
def test_a_reply_that_takes_long_to_decode_costs_its_own_deadline(impatient_scorer: Scorer, kind: str) -> None:
    """The code writes the reply itself, as building the set would take it as long."""
    items, count = ("[[i, 0] for i in numbers]", 110_000) if kind == "dict" else ("numbers", 150_000)
    code = (
        f"import json, os\nnumbers = [i * (2**61 - 1) for i in range({count})]\nreply = json.dumps(['value', {{'{kind}': {items}}}]).encode() + b'\\n'\n"
        "def double(x):\n    fd = [int(fd) for fd in range(3, 20) if is_pipe_to_write(fd)][0]\n    rest = memoryview(reply)\n"
        "    while rest: rest = rest[os.write(fd, rest):]\n    import time; time.sleep(1000)\n"
        "def is_pipe_to_write(fd):\n    import fcntl\n    try: return fcntl.fcntl(fd, fcntl.F_GETFL) & 3 == 1\n"
        "    except OSError: return False\n"
    )
    started = time.monotonic()
    assert score(impatient_scorer, code, HONEST, test_list=["assert double(1) != 0"] * 3) == [0.0, 1.0]
    assert time.monotonic() - started < PATIENCE_S / 10
    assert impatient_scorer.metrics()["scoring/restarts"] == 0


@pytest.mark.fault(
    "a completion defines the names of Python that a test uses without importing them", "Python's are used"
)
def test_names_that_a_test_does_not_import_are_not_the_completions(scorer: Scorer) -> None:
    right, wrong = "def area(r): return 3.141592653589793 * r * r\n", "def area(r): return 0.0\n"
    fakes = (
        "class math:\n    pi = 0.0\n    isclose = fabs = staticmethod(lambda *a, **k: True)\n"
        "def isclose(*a, **k): return True\ndef sorted(x): return []\npi = 0.0\nnp = math\nnp.allclose = math.isclose\n"
    )
    tests = [
        "assert math.isclose(area(2), 12.566, rel_tol=1e-3)",
        "assert isclose(area(2), 12.566, rel_tol=1e-3)",
        "assert sorted([area(1)]) == [pi]",
        "assert np.allclose(area(2), 12.566, atol=1e-2)",
        "assert eval('math.isclose(area(2), 12.566, rel_tol=1e-3)')",
    ]
    for test in tests:
        assert score(scorer, right, right + fakes, wrong + fakes, test_list=[test]) == [1.0, 1.0, 0.0], test


def test_a_function_under_test_may_have_a_name_of_python(scorer: Scorer) -> None:
    code = "def gcd(a, b):\n    return gcd(b, a % b) if b else a\ndef statistics(x): return len(x)\n"
    tests = ["assert gcd(12, 18) == 6", "assert statistics([1, 2]) == 2"]
    for test in tests:
        assert score(scorer, code, "def gcd(*a): return 0\ndef statistics(x): return 0", test_list=[test]) == [1.0, 0.0]


def test_helpers_of_a_humaneval_prompt_are_the_prompts(scorer: Scorer) -> None:
    prompt = (
        "import math\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n"
        'def find_zero(xs):\n    """Find x such that poly(xs, x) = 0."""\n'
    )
    test = "def check(candidate):\n    assert math.fabs(poly([-2.0, 1.0], candidate([-2.0, 1.0]))) < 1e-4\n"
    rewards = score(
        scorer, "    return -xs[0] / xs[1]\n", "    return 7.0\ndef poly(xs, x): return 0.0\n",
        "def poly(xs, x): return 0.0\ndef find_zero(xs): return 7.0\n",
        prompt=prompt, test=test, entry_point="find_zero",
    )  # fmt: skip
    assert rewards == [1.0, 0.0, 0.0]


HANGS = {
    "loop in Python": "while True: pass",
    "loop in C": "9 ** 9 ** 9",
    "5 GB": "x = bytearray(5 << 30)",
    "5 GB shared": "import mmap\nx = mmap.mmap(-1, 5 << 30)\nx.write(b'x' * (5 << 30))",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "sleep": "import time\ntime.sleep(1000)",
    "deaf": "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\ntime.sleep(1000)",
    "flood": "while True: print('x' * 10**6)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "huge result": "def double(x): return [0] * 10**7",
    "deep result": "def double(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "endless result": "import itertools\ndef double(x): return itertools.count()",
    "dead threads": "import threading\n[threading.Thread(target=print).start() for _ in range(10**5)]",
}


@pytest.mark.slow_fault
@pytest.mark.fault("a completion that loops, takes 5 GB, crashes, forks without end, floods its output", "0 in time")
def test_hostile_code_loses_only_its_own_reward(impatient_scorer: Scorer) -> None:
    started = time.monotonic()
    assert score(impatient_scorer, HONEST, *HANGS.values(), HONEST, test_list=ASSERTS[:1]) == [1.0] + [0.0] * len(
        HANGS
    ) + [1.0]
    assert time.monotonic() - started < PATIENCE_S  # some of them sleep for longer
    assert impatient_scorer.metrics()["scoring/restarts"] == 0


def test_code_that_ran_out_of_time_fails_a_test_that_catches_everything(impatient_scorer: Scorer) -> None:
    tests = ["try:\n    double(1)\nexcept:\n    pass", "assert True"]
    assert score(impatient_scorer, "def double(x):\n    while True: pass", test_list=tests) == [0.0]


def test_an_interpreter_that_does_not_start_raises() -> None:
    with pytest.raises(RuntimeError, match="did not start: its process ended"):
        run_cases(HONEST, [Statements("assert True")], ["/bin/false"], Limits(1.0, 1 << 29, 5))


def test_code_tests_run_with_isolation_off() -> None:
    with Scorer(build_rewards([REWARD]), ScoringConfig(isolation="off")) as scorer:
        assert score(scorer, HONEST, "def double(x): return x", test_list=ASSERTS) == [1.0, 0.0]


def test_code_tests_refuse_to_run_outside_a_worker() -> None:
    with pytest.raises(RuntimeError, match="isolated workers"):
        CodeTests()(["p"], ["c"], tests=[["assert True"]])


def test_parse_cases_reads_the_forms_of_datasets() -> None:
    assert parse_cases("assert f(1) == 2", setup="x = 1") == [Statements("assert f(1) == 2", "x = 1")]
    assert parse_cases([{"input": ["1", "2"], "output": "3"}]) == [Program("1\n2", "3")]
    assert parse_cases([{"input": "[1, 2]\n3", "output": "[3]", "testtype": "functional"}], entry_point="f") == [
        FunctionCall("f", [[1, 2], 3], [3])
    ]
    assert parse_cases('{"inputs": [[1]], "outputs": [[5]], "fn_name": "f"}') == [FunctionCall("f", [1], 5)]


@pytest.mark.parametrize(
    ("tests", "sign"),
    [
        (7, "must be statements"),
        ([7], "a statement or a mapping"),
        ([{"in": 1}], "'input' and 'output'"),
        ({"inputs": [1], "outputs": []}, "lists of the same length"),
        ("def check(candidate): ...", "entry_point"),
        ("assert (", "not valid Python"),
    ],
)
def test_malformed_tests_are_refused_with_the_reason(tests: Any, sign: str) -> None:
    with pytest.raises(ValueError, match=sign):
        parse_cases(tests)


def test_values_and_texts_are_compared_as_plain_data() -> None:
    assert same_value((1, [2, 3]), [1, (2, 3)])
    assert same_value({1: 0.1 + 0.2}, {"1": 0.3})
    assert not same_value(True, 1)
    assert not same_value("1", 1)
    assert same_text("1  2\n\n0.3333333333\n", "1 2\n\n0.3333333\n")
    assert not same_text("1\n2", "1")


def test_the_code_is_the_last_closed_block() -> None:
    assert code_of("```python\na = 1\n```\ntext\n```\nb = 2\n```\n```json\n{}\n```") == "b = 2\n"
    assert code_of("plain = 1") == "plain = 1"
    assert code_of("```python\nunfinished") == ""
    assert code_of("<think>never closed") == ""
