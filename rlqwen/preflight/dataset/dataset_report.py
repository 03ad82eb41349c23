"""Print a dataset check."""

import re

from rich.text import Text

from rlqwen.data import DataReport
from rlqwen.data.data_report import RowIssue, format_examples
from rlqwen.errors import DataError
from rlqwen.preflight.check_report import CheckReport
from rlqwen.preflight.dataset.dataset_check import DatasetCheck, PartCheck
from rlqwen.reporting.console import TerminalConsole

_SHOWN_FAULTS = 5
_SHOWN_EQUAL = 5
_PLACED = re.compile(r"(.*?, (?:line|row) \d+): (.*)", re.DOTALL)
_DROPPED: dict[RowIssue, str] = {
    "overlong": "too long",
    "empty_mask": "without a token in the loss",
    "equal_sides": "with equal answers",
}
# Of the other fates the tokenizer's own warnings speak.
_WARNED: dict[RowIssue, str] = {
    "overlong": "dropped, too long",
    "empty_mask": "dropped, no token in the loss",
    "truncated": "cut to length",
    "no_end": "what ends the answer is not in the loss",
}


def show_dataset_check(check: DatasetCheck, console: TerminalConsole) -> None:
    """Print each part, and what the parts have in common; of long lists, the first items."""
    for part in check.parts:
        _part_report(part, check).show(console)
    if len(check.parts) == 2 and check.kind != "unmapped":
        _overlap_report(check).show(console)
    if check.cleaning:
        console.print(Text.assemble(("cleaned", "bold"), "  ", check.cleaning))
    for warning in check.warnings:
        console.print(Text.assemble(("note", "yellow"), "  ", warning))


def _part_report(part: PartCheck, check: DatasetCheck) -> CheckReport:
    report = CheckReport(f"{_title(part, check)}: {part.name}, {check.kind}")
    mismatches = f", {part.num_mismatches:,} of them answers to different prompts" if part.num_mismatches else ""
    faulty = f", {len(part.faults):,} faulty{mismatches}" if part.faults and check.kind != "unmapped" else ""
    report.facts.append(("rows", f"{part.num_rows:,} of {', '.join(part.sources)}{faulty}"))
    if check.kind == "unmapped":
        report.faults = [DataError(fault) for fault in part.faults[-1:]]
        return report
    report.facts.append(("turns", ", ".join(f"{role} {count:,}" for role, count in part.turns.items()) or "none"))
    if part.tokens and part.tokens.lengths:
        report.facts += _token_facts(part.tokens, check.model)
    if part.reward_columns:
        report.facts.append(("for rewards", f"columns {', '.join(part.reward_columns)}, if a reward takes them"))
    if len(part.lengths) > 1:
        report.facts += [(f"{name} tokens", _percentiles(lengths)) for name, lengths in part.lengths.items()]
    for what, groups in (("exact", part.exact_duplicates), ("near", part.near_duplicates)):
        if what == "exact" or check.near_threshold is not None:
            surplus = sum(len(group) - 1 for group in groups)
            text = f"{surplus:,} rows repeat {len(groups):,} others" if groups else "none"
            bound = f" (similarity at least {check.near_threshold:g})" if what == "near" else ""
            report.facts.append((f"{what} duplicates", text + bound))
        if groups:
            report.warnings.append(f"{what} duplicates: {format_examples([_equal(group) for group in groups])}")
    report.warnings += [
        f"{text}: {format_examples(part.fates[fate])}" for fate, text in _WARNED.items() if fate in part.fates
    ]
    report.warnings += part.warnings
    faults = _alike(part.faults)
    report.faults = [DataError(fault) for fault in faults[:_SHOWN_FAULTS]]
    if len(faults) > _SHOWN_FAULTS:
        report.faults.append(DataError(f"and {len(faults) - _SHOWN_FAULTS:,} more; --json lists all"))
    return report


def _title(part: PartCheck, check: DatasetCheck) -> str:
    """Return the recipe, or each file by its own name."""
    return check.title if check.is_recipe else ", ".join(part.sources)


def _equal(group: list[str]) -> str:
    more = f" and {len(group) - _SHOWN_EQUAL:,} more" if len(group) > _SHOWN_EQUAL else ""
    return " = ".join(group[:_SHOWN_EQUAL]) + more


def _alike(faults: list[str]) -> list[str]:
    """Merge faults that are the same for several rows."""
    places: dict[str, list[str]] = {}
    for fault in faults:
        match = _PLACED.fullmatch(fault)
        place, text = match.groups() if match else ("", fault)
        places.setdefault(text, []).append(place)
    said = []
    for text, of in places.items():
        rest = [one.rpartition(", ")[2] for one in of[1:]]
        rows = format_examples([of[0], *rest]) + (f" ({len(of):,} rows)" if len(of) > 1 else "")
        said.append(f"{rows}: {text}" if of[0] else text)
    return said


def _token_facts(data: DataReport, model: str) -> list[tuple[str, str]]:
    facts = [("kept", f"{data.num_kept:,} rows, {data.num_tokens:,} tokens of {model}")]
    if data.num_loss_tokens:
        ends = f"{data.end_of_turn!r} at the end of {data.eos_in_loss:.1%} of what is learned"
        facts.append(("in the loss", f"{data.num_loss_tokens:,} tokens; {ends}"))
    facts += [("form", line) for line in data.form]
    facts.append(("cut", f"{data.count('truncated'):,} rows by {data.num_cut_tokens:,} tokens"))
    dropped = [f"{data.count(fate):,} {what}" for fate, what in _DROPPED.items() if data.count(fate)]
    reasons = f": {', '.join(dropped)}" if dropped else ""
    count = sum(data.count(fate) for fate in _DROPPED)
    facts.append(("dropped", f"{count:,} rows of {data.num_dropped_tokens:,} tokens{reasons}"))
    facts.append(("whole rows", f"{_percentiles(data.lengths)} tokens before any cut"))
    return facts


def _overlap_report(check: DatasetCheck) -> CheckReport:
    train, evaluation = (_title(part, check) for part in check.parts)
    files = train if train == evaluation else f"{evaluation} and {train}"
    report = CheckReport(f"{files}: eval prompts in train")
    for what, pairs in (("exact", check.exact_overlap), ("near", check.near_overlap)):
        if what == "exact" or check.near_threshold is not None:
            report.facts.append((what, f"{len(pairs):,} eval rows"))
        if pairs:
            shown = [f"eval {mine} = train {theirs}" for mine, theirs in pairs]
            report.warnings.append(f"{what}: {format_examples(shown)}")
    return report


def _percentiles(lengths: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in lengths.items())
