"""Pytest plugin for the tests that inject a fault: the long ones wait for `make faults`, which publishes the outcomes.

    @pytest.mark.fault("SIGKILL of the trainer during a save", "the checkpoint before it is whole, and resumes")
    @pytest.mark.slow_fault  # takes more than a few seconds
    def test_...

A row of the table is a test and its two texts; cases of one test that carry the same texts share a row. A `slow_fault`
runs where `-m` speaks of faults, or where a test is asked for by its node id.
"""

import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest

from rlqwen.reporting.summary import package_versions

# Worst first: a row shows the worst of its cases.
FAILED, KNOWN_GAP, SKIPPED, HELD = "**failed**", "known gap", "not run here", "held"
_OUTCOMES = (FAILED, KNOWN_GAP, SKIPPED, HELD)


@dataclass(slots=True)
class Case:
    """One test case: what it injects, and what became of it."""

    test: str
    """Node id without the parameters."""
    injection: str
    expectation: str
    outcome: str = ""
    """One of the four above; empty until it has run."""
    reason: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class FaultTable:
    """Takes down the outcome of every case marked `fault`, and writes the table where one was asked for."""

    path: Path | None
    command: str
    cases: dict[str, Case] = field(default_factory=dict)
    """By node id; those that have run."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        texts = dict(report.user_properties).get("fault")  # of this process or of one of pytest-xdist
        if texts is None:
            return
        injection, expectation = map(str, texts)  # type: ignore[call-overload]
        case = self.cases.setdefault(report.nodeid, Case(report.nodeid.partition("[")[0], injection, expectation))
        case.seconds += report.duration
        if report.failed:
            case.outcome, case.reason = FAILED, ""
        elif report.skipped:
            case.outcome = KNOWN_GAP if hasattr(report, "wasxfail") else SKIPPED
            case.reason = getattr(report, "wasxfail", "") or _skip_reason(report.longrepr)
        elif report.when == "call" and not case.outcome:
            case.outcome = HELD

    def pytest_sessionfinish(self) -> None:
        ran = [case for case in self.cases.values() if case.outcome]
        if self.path and ran:
            self.path.write_text(render(ran, self.command), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="write the outcomes of the tests marked fault to FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = None if hasattr(config, "workerinput") else config.getoption("--fault-table")
    command = "make faults" if path else ""
    config.pluginmanager.register(FaultTable(Path(path) if path else None, command), "fault-table")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("fault")
        if marker is not None:
            if len(marker.args) != 2:
                raise pytest.UsageError(f"{item.nodeid}: fault takes two texts, what is injected and what must happen")
            item.user_properties.append(("fault", marker.args))
        elif item.get_closest_marker("slow_fault"):
            raise pytest.UsageError(f"{item.nodeid}: mark a slow_fault as a fault too, or it has no row in the table")
    if "fault" in config.getoption("-m") or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("slow_fault")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def render(cases: Iterable[Case], command: str) -> str:
    """The table in Markdown, a section a file, whatever the order in which processes ran the cases."""
    rows: dict[tuple[str, str, str], list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.test.partition("::")[0]):
        rows.setdefault((case.test, case.injection, case.expectation), []).append(case)
    worst = {key: min(row, key=lambda case: _OUTCOMES.index(case.outcome)).outcome for key, row in rows.items()}
    counts = ", ".join(
        f"{list(worst.values()).count(outcome)} {outcome}"
        for outcome in reversed(_OUTCOMES)
        if outcome in worst.values()
    )
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    lines = [
        "# Injected faults and their outcomes",
        "",
        (
            f"`{command}` injects each of these {len(rows)} faults for real, and checks that what must happen happens. Run on "
            f"{datetime.now():%Y-%m-%d %H:%M}: {counts}."
        ),
        "",
        (
            "`held`: what must happen has happened, in every case of the test. `known gap`: it is known not to happen. `not run "
            "here`: this machine lacks something that the test needs. The seconds are of all cases together."
        ),
        "",
        f"Machine and versions: {platform.system()} {platform.machine()}; {versions}.",
    ]
    section = ""
    for key, row in rows.items():
        test, injection, expectation = key
        file, _, name = test.partition("::")
        if file != section:
            section = file
            lines += [
                "",
                f"## {file}",
                "",
                "| injected | must happen | outcome | seconds | test |",
                "|---|---|---|---|---|",
            ]
        held = worst[key] + (f" ({len(row)} cases)" if len(row) > 1 else "")
        reasons = "; ".join(dict.fromkeys(case.reason for case in row if case.reason))
        outcome = f"{held}: {reasons}" if reasons else held
        cells = (injection, expectation, outcome, f"{sum(case.seconds for case in row):.1f}", f"`{name}`")
        lines.append("| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _skip_reason(longrepr: object) -> str:
    """Of a skipped test, whose report is (file, line, reason)."""
    return str(longrepr[2]).removeprefix("Skipped: ") if isinstance(longrepr, tuple) else ""
