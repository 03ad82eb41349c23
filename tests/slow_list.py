"""Pytest plugin that knows which tests are slow: those of slow_tests.txt, which a full run writes, and those marked so.

    pytest -m "not slow"                              # make test-fast; names at its end what has become slow since
    pytest --write-slow tests/slow_tests.txt          # measures anew what it runs, and leaves the other lines alone

A test is slow that takes a second of processor time, its children's and its module's fixtures' included, or three by the
clock. Processor time alone would miss what waits; the clock alone would count what other work on the machine takes.
"""

import resource
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_name("slow_tests.txt")
CPU_S, WALL_S = 1.0, 3.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-slow", metavar="FILE", help="write which of the tests that run are slow to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Clock(), "slow-clock")
    if not hasattr(config, "workerinput"):
        path = config.getoption("--write-slow")
        config.pluginmanager.register(SlowList(config.getoption("-m"), Path(path) if path else None), "slow-list")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = read_list(LIST)
    for item in items:
        if not known.isdisjoint((bare(item.nodeid), file_of(item.nodeid))):
            item.add_marker("slow")


def read_list(path: Path) -> set[str]:
    """Node ids without parameters, or files where all of their tests are slow."""
    return {line for line in path.read_text().splitlines() if line and line[0] != "#"} if path.exists() else set()


def bare(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def now() -> tuple[float, float]:
    """Processor time of this process and of its children that have ended, and the clock; seconds."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime, time.monotonic()


@dataclass(eq=False)
class Clock:
    """Puts into each report what the test took; a module's fixtures count for every test that uses them."""

    shared: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """(module, fixture) -> processor time, clock."""
    begun: tuple[float, float] = (0.0, 0.0)
    paid: tuple[float, float] = (0.0, 0.0)
    """What this setup spent on shared fixtures."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        begun = now()
        try:
            return (yield)
        finally:
            taken = since(begun)
            if fixturedef.scope != "function":
                self.paid = (self.paid[0] + taken[0], self.paid[1] + taken[1])
            if fixturedef.scope == "module":
                self.shared[request.node.nodeid, fixturedef.argname] = taken

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
        report: Any = yield
        if call.when in ("setup", "call"):
            cpu, wall = since(self.begun)
            report.cpu_s, report.wall_s = cpu - self.paid[0], wall - self.paid[1]
            if call.when == "setup":
                names = [(file_of(item.nodeid), name) for name in getattr(item, "fixturenames", ())]
                report.cpu_s += sum(self.shared[name][0] for name in names if name in self.shared)
                report.wall_s += sum(self.shared[name][1] for name in names if name in self.shared)
        self.begun, self.paid = now(), (0.0, 0.0)
        return report

    def pytest_runtest_logstart(self) -> None:
        self.begun, self.paid = now(), (0.0, 0.0)


def since(begun: tuple[float, float]) -> tuple[float, float]:
    cpu, wall = now()
    return cpu - begun[0], wall - begun[1]


@dataclass(eq=False)
class SlowList:
    """Adds up the reports; writes the list, or names what it lacks."""

    markers: str
    path: Path | None
    taken: dict[str, list[float]] = field(default_factory=dict)
    """By node id: processor time, clock."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if hasattr(report, "cpu_s"):
            taken = self.taken.setdefault(report.nodeid, [0.0, 0.0])
            taken[0] += report.cpu_s
            taken[1] += report.wall_s

    def slow(self) -> dict[str, float]:
        """Of each test function that is slow, the longest time of its cases by the clock."""
        slow: dict[str, float] = {}
        for nodeid, (cpu, wall) in self.taken.items():
            if cpu >= CPU_S or wall >= WALL_S:
                slow[bare(nodeid)] = max(wall, slow.get(bare(nodeid), 0.0))
        return slow

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        slow = self.slow()
        if self.path is not None:
            measured = {of(nodeid) for nodeid in self.taken for of in (bare, file_of)}
            kept = read_list(self.path) - measured
            lines = "\n".join(sorted(kept | set(slow)))
            self.path.write_text(f"# Written by pytest --write-slow; see slow_list.py.\n{lines}\n")
        elif "not slow" in self.markers and slow:
            terminalreporter.section("slow tests that tests/slow_tests.txt does not name")
            for nodeid, wall in sorted(slow.items(), key=lambda entry: -entry[1]):
                terminalreporter.line(f"{wall:6.1f} s  {nodeid}")
