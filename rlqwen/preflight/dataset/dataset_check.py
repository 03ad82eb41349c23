"""`rlqwen data check`: everything that can be told of data without training on it."""

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rlqwen.data import DataReport
from rlqwen.data.data_report import Fate, percentiles
from rlqwen.data.messages import to_turns
from rlqwen.data.sources import Row
from rlqwen.errors import DataError
from rlqwen.preflight.dataset.repeats import find_overlap, find_repeats
from rlqwen.preflight.dataset.subject import Kind, Part, Subject, clean_parts, read_part, unmapped
from rlqwen.preflight.dataset.token_stats import Segment, tokenize_subject
from rlqwen.rewards.registry import taken_columns

NEAR = 0.8
"""Similarity from which rows count as near; see rlqwen.data.duplicates."""

_ROW = re.compile(r"\brow (\d+)\b")
_FAULTY_ROW = re.compile(r"row (\d+)\b")


@dataclass
class PartAudit:
    """What was found in one part; rows are named by their places in their source, such as `line 3`."""

    name: str
    sources: list[str]
    """Paths or generators."""
    num_rows: int
    turns: dict[str, int]
    """Turns by role; plain texts count as `text`."""
    faults: list[str]
    """Rows that cannot be used, and what is wrong with all of them."""
    num_mismatches: int
    """Faulty rows that are pairs whose prompts differ."""
    tokens: DataReport | None = None
    fates: dict[Fate, list[str]] = field(default_factory=dict)
    """What became of rows, and of which; see DataReport."""
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    """Percentiles of tokens of each segment, as it is trained on."""
    exact_duplicates: list[list[str]] = field(default_factory=list)
    near_duplicates: list[list[str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    reward_columns: list[str] = field(default_factory=list)
    """Of prompts whose rewards are not known here: columns that rewards may take."""


@dataclass
class DataAudit:
    """What was found in all of it."""

    title: str
    kind: Kind
    model: str
    parts: list[PartAudit]
    exact_overlap: list[tuple[str, str]] = field(default_factory=list)
    """(eval row, training row) with the same prompt."""
    near_overlap: list[tuple[str, str]] = field(default_factory=list)
    near_threshold: float | None = None
    cleaning: str | None = None
    """What the recipe's cleaning did, before all else was looked at."""
    warnings: list[str] = field(default_factory=list)
    is_recipe: bool = False

    @property
    def num_faults(self) -> int:
        return sum(len(part.faults) for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self) | {"num_faults": self.num_faults}
        for part in values["parts"]:
            for twice in ("rows", "warnings", "notes"):  # the part has them, by places instead of numbers
                (part["tokens"] or {}).pop(twice, None)
        return values


def audit_data(subject: Subject, near: float | None = NEAR) -> DataAudit:
    """Read, tokenise and compare all rows of the subject; faults are collected, not raised.

    `near`: similarity from which rows count as near duplicates; None looks for equal ones only.
    """
    audit = DataAudit(subject.title, subject.kind, subject.model, [], near_threshold=near)
    audit.warnings, audit.is_recipe = subject.warnings, subject.is_recipe
    parts = [read_part(name, sources) for name, sources in subject.parts.items()]
    if subject.cleaning is not None and parts[0].rows:
        audit.cleaning = clean_parts(parts, subject.cleaning)
    audit.parts = [_audit_part(part, subject, near) for part in parts]
    if len(parts) == 2:
        train, evaluation = (_usable(part) for part in parts)
        places, known = evaluation.short_places(), train.short_places()
        exact, near_pairs = find_overlap(_with_text(evaluation.rows, subject), _with_text(train.rows, subject), near)
        audit.exact_overlap, audit.near_overlap = (
            [(places[mine], known[theirs]) for mine, theirs in pairs] for pairs in (exact, near_pairs)
        )
    return audit


def _audit_part(part: Part, subject: Subject, near: float | None) -> PartAudit:
    audit = PartAudit(
        part.name,
        [str(source.path or source.generator or "sampled") for source in subject.parts[part.name]],
        len(part.rows) + len(part.faults),
        _count_turns(part.rows, subject.text_field),
        list(part.faults),
        part.num_mismatches,
    )
    if subject.kind == "unmapped" and part.rows:
        part.faulty_rows = set(range(len(part.rows)))
        audit.faults.append(f"{part.places[0]}: {unmapped(part.rows[0])}")
    if not part.rows or part.faulty_rows:
        return audit
    places = part.short_places()
    faults: list[DataError] = []
    rows, report = tokenize_subject(part.rows, subject, faults)
    audit.tokens = report
    audit.fates = {fate: [places[number] for number in numbers] for fate, numbers in report.rows.items()}
    audit.faults += [_placed(str(fault), part.places) for fault in faults]
    part.faulty_rows = {int(match[1]) for fault in faults if (match := _FAULTY_ROW.match(str(fault)))}
    if subject.kind == "prompts" and subject.rewards is None:
        audit.reward_columns = list(report.columns)
        report.name_unused(None)
    elif subject.kind == "prompts":
        report.name_unused(taken_columns(subject.rewards or ()))
    audit.warnings = [*report.notes, *(_placed(warning, places) for warning in report.warnings)]
    audit.lengths = _measure(rows)
    if report.num_loss_tokens and not report.eos_in_loss:
        audit.faults.append(
            f"no row has its end token {report.end_of_turn!r} in the loss, so the model would never learn to stop"
        )
    usable = _usable(part)
    places = usable.short_places()
    repeats = find_repeats(_with_text(usable.rows, subject), near)
    audit.exact_duplicates, audit.near_duplicates = (
        [[places[number] for number in group] for group in groups] for groups in repeats
    )
    return audit


def _usable(part: Part) -> Part:
    """Return the part without rows that cannot be tokenised, because rows without text would count as duplicates."""
    stay = [number for number in range(len(part.rows)) if number not in part.faulty_rows]
    return Part(part.name, [part.rows[number] for number in stay], [part.places[number] for number in stay])


def _count_turns(rows: list[Row], text_field: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in rows:
        columns = ["messages"] if "messages" in row and "prompt" not in row else ["prompt", "completion"]
        for column in [*columns, "chosen", "rejected"]:
            content = row.get(column, [])
            counts.update(["text"] if isinstance(content, str) else [turn["role"] for turn in to_turns(content, "")])
        counts["text"] += row.get(text_field) is not None and "messages" not in row and "prompt" not in row
    return {role: count for role, count in counts.most_common() if count}


def _with_text(rows: list[Row], subject: Subject) -> list[Row]:
    """The rows with their plain text in the column where it is looked for."""
    name = subject.text_field
    return rows if name == "text" else [row | {"text": row[name]} if row.get(name) is not None else row for row in rows]


def _measure(rows: list[list[Segment]]) -> dict[str, dict[str, int]]:
    lengths: dict[str, list[int]] = {}
    for row in rows:
        for segment in row:
            lengths.setdefault(segment.name, []).append(len(segment.tokens.token_ids))
    return {name: percentiles(values) for name, values in lengths.items()}


def _placed(text: str, places: list[str]) -> str:
    """Rows by their places instead of their numbers."""
    return _ROW.sub(lambda match: places[int(match[1])] if int(match[1]) < len(places) else match[0], text)
