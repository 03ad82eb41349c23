"""Collect and print what a check found."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from rlqwen.errors import InputError
from rlqwen.reporting.console import TerminalConsole


@dataclass(frozen=True)
class Figures:
    """A table of figures."""

    columns: tuple[str, ...]
    """Heads of the columns; the first is the title."""
    rows: list[tuple[str, ...]]


@dataclass
class CheckReport:
    """Facts, warnings and faults that a check found."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(area, what was found), in the order of the checks."""
    figures: list[Figures] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    faults: list[InputError] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add a fault that is raised inside to the report, so that it ends one check and not the others."""
        try:
            yield
        except InputError as fault:
            if str(fault) not in map(str, self.faults):  # two checks may meet the same fault
                self.faults.append(fault)

    def collect(self, checks: Iterable[Callable[[], object]]) -> None:
        """Make all checks, and add the faults that they raise to the report."""
        for check in checks:
            with self.collecting():
                check()

    def show(self, console: TerminalConsole) -> None:
        """Print facts, warnings and faults."""
        verdict = ("ok", "green") if not self.faults else (f"{len(self.faults)} wrong", "bold red")
        console.print(Text.assemble((self.title, "bold"), "  ", verdict))
        table = Table(box=None, show_header=False, padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for area, found in self.facts:
            table.add_row(area, Text(found))
        console.print(table)
        for figures in self.figures:
            _show_figures(console, figures)
        table = Table(box=None, show_header=False, padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for warning in self.warnings:
            table.add_row(Text("warning", style="yellow"), Text(warning))
        for fault in self.faults:
            table.add_row(Text("wrong", style="bold red"), Text(str(fault)))
        console.print(table)


def _show_figures(console: TerminalConsole, figures: Figures) -> None:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for place, head in enumerate(figures.columns):
        table.add_column(head, justify="right" if place else "left", no_wrap=not place)
    for row in figures.rows:
        table.add_row(*row, style="bold" if row is figures.rows[-1] else None)
    console.print(table)
