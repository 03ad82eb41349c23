"""The table of injected faults: which tests run when, and what is published of them."""

from pathlib import Path

import pytest

MARKED = """
import pytest

@pytest.mark.fault("a flipped byte", "refused by name")
@pytest.mark.parametrize("byte", [0, 1])
def test_byte(byte): pass

@pytest.mark.fault("a full disk", "nothing is lost")
@pytest.mark.slow_fault
def test_disk(): assert False

@pytest.mark.fault("a | b", "gap")
@pytest.mark.xfail(reason="no such thing yet", strict=True)
def test_gap(): assert False

@pytest.mark.fault("no device", "said")
def test_device(): pytest.skip("no GPU here")

def test_no_fault(): assert False
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A suite of its own, with the plugin that this one has."""
    pytester.makeini("[pytest]\nmarkers =\n  fault: a row\n  slow_fault: a long one\n")
    pytester.makepyfile(test_marked=MARKED)
    return pytester


def run(suite: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return suite.runpytest_inprocess("-p", "tests.fault_table", "-p", "no:cacheprovider", *arguments)


def test_a_plain_run_leaves_the_slow_ones_out_and_writes_nothing(suite: pytest.Pytester) -> None:
    outcome = run(suite)
    outcome.assert_outcomes(passed=2, xfailed=1, skipped=1, failed=1, deselected=1)
    outcome.stdout.fnmatch_lines(["FAILED *test_no_fault*"])
    assert not list(suite.path.glob("*.md"))


@pytest.mark.parametrize("processes", [[], ["-n", "2"]])
def test_the_faults_alone_are_published_with_their_outcomes(suite: pytest.Pytester, processes: list[str]) -> None:
    run(suite, "-m", "fault", "--fault-table", "FAULTS.md", *processes).assert_outcomes(
        passed=2, xfailed=1, skipped=1, failed=1
    )
    table = (suite.path / "FAULTS.md").read_text()
    assert "injects each of these 4 faults for real" in table
    assert ": 1 held, 1 not run here, 1 known gap, 1 **failed**." in table
    assert "| a flipped byte | refused by name | held (2 cases) |" in table
    assert "| a full disk | nothing is lost | **failed** |" in table
    assert r"| a \| b | gap | known gap: no such thing yet |" in table
    assert "| no device | said | not run here: no GPU here |" in table


def test_make_names_the_table_within_the_option() -> None:
    """pytest would take a file that is there, as the table is, for a test to collect, and would not know the option."""
    assert "--fault-table=FAULTS.md" in (Path(__file__).parents[1] / "Makefile").read_text()


def test_a_slow_fault_asked_for_by_name_runs(suite: pytest.Pytester) -> None:
    run(suite, "test_marked.py::test_disk").assert_outcomes(failed=1)


@pytest.mark.parametrize("marks", ["slow_fault", "fault('only one text')"])
def test_a_fault_without_a_row_is_refused(suite: pytest.Pytester, marks: str) -> None:
    suite.makepyfile(test_marked=f"import pytest\n\n@pytest.mark.{marks}\ndef test_it(): pass\n")
    assert run(suite).ret == pytest.ExitCode.USAGE_ERROR
