"""Attack the trainer from inside a reward worker: forged, late, slow, huge and malformed messages; its guard; its signals."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from rlqwen.rewards import dispatcher, worker_handle
from rlqwen.rewards.failure_log import FILE_NAME
from tests.patience import PATIENCE_S, wait_until
from tests.rewards.odd_messages import odd_message
from tests.rewards.test_scorer import make_group, scoring, workers_of


@pytest.fixture(autouse=True, scope="module")
def _by_value() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def open_files() -> dict[int, str]:
    """Return what each descriptor is; a worker inherits numbers of the trainer, which may hold hundreds of files."""
    paths = {fd: f"/proc/self/fd/{fd}" for fd in range(3, 4096)}
    return {fd: os.readlink(path) for fd, path in paths.items() if os.path.lexists(path)}  # noqa: PTH115


def send_bytes(framed: bytes) -> None:
    """Write to the trainer, on the descriptor that hostile code would find."""
    fd = next(fd for fd, target in open_files().items() if target.startswith("socket:"))
    while framed:
        framed = framed[os.write(fd, framed) :]


def send(*content: Any) -> None:
    text = content[0] if isinstance(content[0], bytes) else json.dumps(content).encode()
    send_bytes(len(text).to_bytes(4, "big") + text)


def number() -> int:
    """Return the number of the call in progress, which hostile code finds in a frame of the worker."""
    frame: Any = sys._getframe()
    while "number" not in frame.f_locals:
        frame = frame.f_back
    return int(frame.f_locals["number"])


def answer(*, reward: Any = 1.0, status: Any = "ok", trace: Any = None, metrics: Any = (), extras: Any = None) -> None:
    send("result", number(), [reward], [status], [trace], list(metrics), extras or {})


def send_twice() -> None:
    text = json.dumps(["result", number(), [777.0], ["ok"], [None], [], {}]).encode()
    send_bytes(2 * (len(text).to_bytes(4, "big") + text))


def answer_with(text: bytes) -> None:
    send(json.dumps(["result", number(), [0], ["ok"], [None], [], {}]).encode().replace(b"[0]", b"[" + text + b"]"))


ATTACKS: dict[str, tuple[Callable[[], Any], str]] = {
    "ready again": (lambda: send("ready"), "it sent 'ready', and 'result' or 'failed' was due"),
    "ready with the id of a stranger": (lambda: send("ready", os.getppid()), "'ready', and"),
    "started": (lambda: send("started"), "'started', and"),
    "unsafe": (lambda: send("unsafe", "chosen text"), "'unsafe', and"),
    "unloadable": (lambda: send("unloadable", 0, "\x1b]0;chosen\x07text"), "'unloadable', and"),
    "unknown": (lambda: send("\x1b[2Jline\nline" * 99), r"it sent '\x1b[2Jline\nline"),
    "another call": (lambda: send("failed", number() + 1, "error", ""), "answered call a int instead"),
    "twice": (lambda: send_twice(), "and nothing was due"),
    "timeout": (lambda: send("failed", number(), "timeout", ""), "status 'timeout'"),
    "a status of its own": (lambda: answer(status="fine", reward=None, trace=""), "status 'fine'"),
    "a reward that is missing": (lambda: answer(status="invalid", trace=""), "a reward that is missing has a value"),
    "10^4000": (lambda: answer_with(b"9" * 4000), "too large to convert to float"),
    "10^400000": (lambda: answer_with(b"9" * 100_000), "malformed"),
    "1e999": (lambda: answer_with(b"1e999"), "inf instead of a finite number"),
    "NaN": (lambda: answer_with(b"NaN"), "NaN is no number"),
    "true": (lambda: answer(reward=True), "instead of a number"),
    "two for one": (lambda: answer_with(b"1.0, 2.0"), "a list instead of a list of 1"),
    "a metric": (lambda: answer(metrics=[["loss", -5.0]]), "metrics that the reward cannot have logged"),
    "extras": (lambda: answer(extras={"advantage": [9.0]}), "extras that the reward cannot have logged"),
    "a long traceback": (
        lambda: send("failed", number(), "error", "x" * 30_000),
        "a text of 30,000 characters, and at most 20,000",
    ),
    "deep lists": (lambda: send(b"[" * 100_000), "malformed"),
    "60 MB of lists": (lambda: send_bytes((60 << 20).to_bytes(4, "big") + b"[" * 99), "a message of 62,914,560 bytes"),
    "a length below 0": (lambda: send_bytes(b"\xff\xff\xff\xff"), "a message of -1 bytes"),
    "no JSON": (lambda: send(b"\xff\xfe"), "malformed"),
    "not a list": (lambda: send(b"17"), "malformed"),
    "half a message": (lambda: send_bytes(b"\x00\x00\x01\x00half"), "not complete after 1 s"),
}


def attack_or_one(completions: list[str]) -> list[float]:
    for text in completions:
        if text in ATTACKS:
            ATTACKS[text][0]()
            time.sleep(2 * PATIENCE_S)
    return [1.0] * len(completions)


@pytest.mark.fault(
    "hostile code in a reward worker forges, repeats, delays or swells what it sends to the trainer",
    "the worker is replaced; one failed call, with the reason in one line",
)
def test_what_a_worker_may_not_send_costs_it_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_MESSAGE_WAIT_S", 1.0)
    groups = {name: make_group(name) for name in ATTACKS}
    with scoring(attack_or_one, timeout=PATIENCE_S, failures_dir=tmp_path, num_workers=2) as scorer:
        started = time.monotonic()
        scorer.score([one for group in groups.values() for one in (group, make_group("good"))])
        assert scorer.metrics()["scoring/restarts"] == len(ATTACKS)
        scorer.score([last := make_group("good")])
        metrics = scorer.metrics()
    assert time.monotonic() - started < PATIENCE_S  # ended before their deadline
    records = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    reasons = {record["completion"]: record["traceback"] for record in records}
    assert {name for name, (_, sign) in ATTACKS.items() if sign not in reasons[name]} == set(), reasons
    assert all(len(reason) < 400 and reason.isprintable() for reason in reasons.values())
    assert {name for name, group in groups.items() if group.call_statuses["attack_or_one"] != ["error"]} == set()
    assert last.rewards["attack_or_one"] == [1.0]
    assert metrics["reward/attack_or_one/ok"] == len(ATTACKS) + 1
    assert "loss" not in metrics


def drip(completions: list[str]) -> list[float]:
    if completions == ["bad"]:
        send_bytes((200_000).to_bytes(4, "big"))
        while True:
            send_bytes(b"x")
            time.sleep(0.02)
    return [1.0]


@pytest.mark.fault(
    "a reward worker answers one byte at a time, for ever", "its call failed at the deadline of a message"
)
def test_a_reply_of_a_byte_at_a_time_does_not_hold_the_others_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_MESSAGE_WAIT_S", 1.0)
    bad, good = make_group("bad"), make_group("good")
    with scoring(drip, timeout=PATIENCE_S) as scorer:
        scorer.wait_until_ready()
        started = time.monotonic()
        scorer.score([bad, good])
    assert (bad.call_statuses["drip"], good.rewards["drip"]) == (["error"], [1.0])
    assert time.monotonic() - started < PATIENCE_S / 10


def late(completions: list[str]) -> list[float]:
    """Answer, and send again between two calls, from a thread."""

    def again() -> None:
        time.sleep(0.3)
        send("result", 1, [777.0], ["ok"], [None], [["loss", -5.0]], {})

    if completions == ["bad"]:
        threading.Thread(target=again).start()
    return [1.0]


@pytest.mark.fault("a reward worker sends a result between two calls", "it is taken for none; one line says so")
def test_a_result_that_is_not_due_is_taken_for_no_call(caplog: pytest.LogCaptureFixture) -> None:
    with scoring(late) as scorer:
        for _ in range(7):  # more often than workers may die that were never called
            scorer.score([make_group("bad")])
            restarts = scorer.metrics()["scoring/restarts"] + 1
            wait_until(lambda: scorer.metrics()["scoring/restarts"] == restarts, "the worker was replaced")  # noqa: B023
        scorer.score([good := make_group("good")])
        metrics = scorer.metrics()
    assert good.rewards["late"] == [1.0]
    assert "loss" not in metrics
    assert sum("nothing was due" in record.getMessage() for record in caplog.records) == 1


def test_a_worker_that_does_not_read_holds_no_other_up() -> None:
    """The arguments of the second call fill the connection of a worker that is stopped."""

    def stops(completions: list[str]) -> list[float]:
        if completions[0] == "bad":
            send("result", number(), [1.0], ["ok"], [None], [], {})
            os.kill(os.getpid(), signal.SIGSTOP)
        return [1.0]

    large = make_group("x" * (8 << 20))
    with scoring(stops, timeout=3.0, num_workers=2) as scorer:
        scorer.wait_until_ready()
        scorer.score([make_group("bad"), large, make_group("a"), make_group("b")])
        scorer.score([good := make_group("good")])
    assert good.rewards["stops"] == [1.0]


def blind_the_guard(completions: list[str]) -> list[float]:
    """Close and write everything that the worker holds but its connection, then take more processes than allowed."""
    for fd, target in open_files().items():
        if not target.startswith("socket:"):
            with contextlib.suppress(OSError):
                os.write(fd, b"x")
            os.close(fd)
    for _ in range(60):
        subprocess.Popen(["/bin/sleep", "600"])
    time.sleep(2 * PATIENCE_S)
    return [1.0]


@pytest.mark.fault(
    "an isolated reward closes and writes what its guard might wait for", "the guard's limits still hold"
)
def test_the_guard_waits_for_nothing_that_the_worker_holds() -> None:
    group, before = make_group("a"), len(workers_of(os.getpid()))
    with scoring(blind_the_guard, isolated=["blind_the_guard"], timeout=PATIENCE_S) as scorer:
        started = time.monotonic()
        scorer.score([group])
        assert time.monotonic() - started < PATIENCE_S
        wait_until(lambda: len(workers_of(os.getpid())) <= before + 2, "the end of what the reward started")
    assert group.call_statuses["blind_the_guard"] == ["error"]


def leave_by_a_real_time_signal(completions: list[str]) -> list[float]:
    if completions == ["bad"]:
        os.kill(os.getpid(), signal.SIGRTMIN + 2)
    if completions == ["worse"]:
        os._exit(128 + signal.SIGXCPU)
    return [1.0]


def test_the_end_of_a_worker_is_not_told_by_the_worker() -> None:
    bad, worse = make_group("bad"), make_group("worse")
    with scoring(leave_by_a_real_time_signal) as scorer:
        scorer.score([bad, worse])
    statuses = [group.call_statuses["leave_by_a_real_time_signal"] for group in (bad, worse)]
    assert statuses == [["error"], ["error"]]  # not `timeout`, which it would be after the limit of processor time


def signal_attempts(strangers: list[int]) -> list[tuple[str, Callable[[], Any]]]:
    import fcntl
    import socket
    import struct

    ours, theirs = socket.socketpair()
    reader, _ = os.pipe()
    attempts: list[tuple[str, Callable[[], Any]]] = [
        ("F_SETSIG", lambda: fcntl.fcntl(ours, 10, signal.SIGKILL)),
        ("O_ASYNC", lambda: fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | 0x2000)),
        ("F_NOTIFY", lambda: fcntl.fcntl(reader, fcntl.F_NOTIFY, 1)),
        ("F_SETLEASE", lambda: fcntl.fcntl(reader, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
        ("FIOASYNC", lambda: fcntl.ioctl(ours, 0x5452, struct.pack("i", 1))),
        ("TIOCSTI", lambda: fcntl.ioctl(reader, 0x5412, b"x")),
        ("TIOCSCTTY", lambda: fcntl.ioctl(reader, 0x540E, 0)),
        ("out-of-band data", lambda: ours.send(b"x", socket.MSG_OOB)),
        ("a descriptor of a file", lambda: socket.send_fds(ours, [b"x"], [reader])),
        ("all of a group", lambda: os.kill(0, 0)),
        ("all", lambda: os.kill(-1, 0)),
    ]
    for pid in strangers:
        attempts += [
            ("kill", lambda pid=pid: os.kill(pid, signal.SIGKILL)),  # type: ignore[misc]
            ("tgkill", lambda pid=pid: system_call(234, pid, pid, signal.SIGKILL)),  # type: ignore[misc]
            ("F_SETOWN", lambda pid=pid: fcntl.fcntl(theirs, fcntl.F_SETOWN, pid)),  # type: ignore[misc]
            ("F_SETOWN_EX", lambda pid=pid: fcntl.fcntl(theirs, 15, struct.pack("ii", 1, pid))),  # type: ignore[misc]
            ("FIOSETOWN", lambda pid=pid: fcntl.ioctl(theirs, 0x8901, struct.pack("i", pid))),  # type: ignore[misc]
            ("SIOCSPGRP", lambda pid=pid: fcntl.ioctl(theirs, 0x8902, struct.pack("i", pid))),  # type: ignore[misc]
        ]
    return attempts


def system_call(*arguments: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")


OLD_KERNEL = "from rlqwen.rewards.sandbox import landlock; landlock.version = lambda: 5; "


@pytest.mark.fault(
    "an isolated reward signals the trainer, its threads and strangers, on a kernel before 6.12: kill, fcntl, ioctl",
    "all refused; its own programs it can signal",
)
@pytest.mark.parametrize("old_kernel", [False, True], ids=["new", "old"])
def test_an_isolated_worker_signals_its_own_processes_only(old_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap = worker_handle._BOOTSTRAP.replace("from rlqwen", f"{OLD_KERNEL if old_kernel else ''}from rlqwen", 1)
    monkeypatch.setattr(worker_handle, "_BOOTSTRAP", bootstrap)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    stranger = subprocess.Popen(["/bin/sleep", "600"])
    assert thread.native_id is not None
    trainer = os.getpid()
    targets = [trainer, thread.native_id, stranger.pid]

    def attacks(log_extra: Any, completions: list[str]) -> list[float]:
        succeeded = []
        for name, attempt in signal_attempts([*targets, os.getppid()]):
            try:
                attempt()
            except OSError:
                continue
            succeeded.append(name)
        child = subprocess.Popen(["/bin/sleep", "600"])
        child.kill()
        os.kill(os.getpid(), 0)
        log_extra("succeeded", [succeeded])
        return [float(child.wait() == -signal.SIGKILL)]

    group = make_group("a")
    try:
        with scoring(attacks, isolated=["attacks"]) as scorer:
            scorer.score([group])
        assert group.call_statuses["attacks"] == ["ok"]
        assert group.extras["succeeded"] == ["[]"]
        assert group.rewards["attacks"] == [1.0]
        assert stranger.poll() is None
    finally:
        stop.set()
        stranger.kill()
        stranger.wait()


def fuzz_the_trainer(completions: list[str]) -> list[float]:
    if completions[0].startswith("seed"):
        source = random.Random(completions[0])
        for _ in range(source.randint(1, 3)):
            send_bytes(odd_message(source, number()))
        time.sleep(source.choice([0.0, 0.0, 2 * PATIENCE_S]))
    return [1.0]


@pytest.mark.slow_fault
@pytest.mark.fault("200 random messages of real workers to the trainer", "it scores on after each")
def test_the_trainer_scores_on_after_random_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_MESSAGE_WAIT_S", 0.3)
    with scoring(fuzz_the_trainer, timeout=0.5, num_workers=2, max_wait_share=1.0) as scorer:
        for seed in range(200):
            scorer.score([make_group(f"seed {seed}")])
        # What a sample left in its worker may cost the next call there; then the worker is replaced.
        statuses = []
        for _ in range(4):
            scorer.score([good := make_group("good")])
            statuses += good.call_statuses["fuzz_the_trainer"]
    assert statuses.count("ok") >= 2
    assert good.rewards["fuzz_the_trainer"] == [1.0]
    assert psutil.Process().memory_info().rss < 4 << 30
