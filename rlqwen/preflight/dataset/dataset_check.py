"""Find everything about a data set that shows without training on it, for `rlqwen data check`."""

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rlqwen.data import DataReport
from rlqwen.data.data_report import RowIssue, percentiles
from rlqwen.data.messages import to_messages
from rlqwen.data.sources import Row
from rlqwen.errors import DataError
from rlqwen.preflight.dataset.check_target import CheckTarget, Kind, Part, clean_parts, read_part, unmapped
from rlqwen.preflight.dataset.duplicate_rows import find_duplicate_rows, find_overlap
from rlqwen.preflight.dataset.row_segments import Segment, segment_rows
from rlqwen.rewards.registry import taken_columns

NEAR = 0.8
"""Smallest similarity of rows that count as near duplicates; see rlqwen.data.duplicates."""

_ROW = re.compile(r"\brow (\d+)\b")
_FAULTY_ROW = re.compile(r"row (\d+)\b")


@dataclass
class PartCheck:
    """The findings in one part; rows are named by their places in their source, such as `line 3`."""

    name: str
    sources: list[str]
    """Paths or generators."""
    num_rows: int
    turns: dict[str, int]
    """Number of messages by role; plain texts count as `text`."""
    faults: list[str]
    """Rows that cannot be used, and faults of the part as a whole."""
    num_mismatches: int
    """Faulty rows that are pairs whose prompts differ."""
    tokens: DataReport | None = None
    fates: dict[RowIssue, list[str]] = field(default_factory=dict)
    """What happened to rows -> the places of those rows; see DataReport."""
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    """Percentiles of the tokens of each segment, as trained on."""
    exact_duplicates: list[list[str]] = field(default_factory=list)
    near_duplicates: list[list[str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    reward_columns: list[str] = field(default_factory=list)
    """Columns that rewards may take; for prompts whose rewards are not known here."""


@dataclass
class DatasetCheck:
    """The findings in all parts of a data set."""

    title: str
    kind: Kind
    model: str
    parts: list[PartCheck]
    exact_overlap: list[tuple[str, str]] = field(default_factory=list)
    """(evaluation row, training row) with the same prompt."""
    near_overlap: list[tuple[str, str]] = field(default_factory=list)
    """(evaluation row, training row) with nearly the same prompt."""
    near_threshold: float | None = None
    """Smallest similarity of near duplicates; None if they were not looked for."""
    cleaning: str | None = None
    """What the recipe's cleaning did before the rows were checked. None: nothing."""
    warnings: list[str] = field(default_factory=list)
    is_recipe: bool = False

    @property
    def num_faults(self) -> int:
        """Return how many faults all parts have."""
        return sum(len(part.faults) for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self) | {"num_faults": self.num_faults}
        for part in values["parts"]:
            for twice in ("rows", "warnings", "notes"):  # the part has them, by places instead of numbers
                (part["tokens"] or {}).pop(twice, None)
        return values


def check_dataset(target: CheckTarget, near: float | None = NEAR) -> DatasetCheck:
    """Read, tokenize and compare all rows of the target; collect faults instead of raising them.

    `near`: smallest similarity of near duplicates; None looks for exact duplicates only.
    """
    check = DatasetCheck(target.title, target.kind, target.model, [], near_threshold=near)
    check.warnings, check.is_recipe = target.warnings, target.is_recipe
    parts = [read_part(name, sources) for name, sources in target.parts.items()]
    if target.cleaning is not None and parts[0].rows:
        check.cleaning = clean_parts(parts, target.cleaning)
    check.parts = [_check_part(part, target, near) for part in parts]
    if len(parts) == 2:
        train, evaluation = (_usable(part) for part in parts)
        places, known = evaluation.short_places(), train.short_places()
        exact, near_pairs = find_overlap(_with_text(evaluation.rows, target), _with_text(train.rows, target), near)
        check.exact_overlap, check.near_overlap = (
            [(places[mine], known[theirs]) for mine, theirs in pairs] for pairs in (exact, near_pairs)
        )
    return check


def _check_part(part: Part, target: CheckTarget, near: float | None) -> PartCheck:
    check = PartCheck(
        part.name,
        [str(source.path or source.generator or "sampled") for source in target.parts[part.name]],
        len(part.rows) + len(part.faults),
        _count_turns(part.rows, target.text_field),
        list(part.faults),
        part.num_mismatches,
    )
    if target.kind == "unmapped" and part.rows:
        part.faulty_rows = set(range(len(part.rows)))
        check.faults.append(f"{part.places[0]}: {unmapped(part.rows[0])}")
    if not part.rows or part.faulty_rows:
        return check
    places = part.short_places()
    faults: list[DataError] = []
    rows, report = segment_rows(part.rows, target, faults)
    check.tokens = report
    check.fates = {fate: [places[number] for number in numbers] for fate, numbers in report.rows.items()}
    check.faults += [_placed(str(fault), part.places) for fault in faults]
    part.faulty_rows = {int(match[1]) for fault in faults if (match := _FAULTY_ROW.match(str(fault)))}
    if target.kind == "prompts" and target.rewards is None:
        check.reward_columns = list(report.columns)
        report.name_unused(None)
    elif target.kind == "prompts":
        report.name_unused(taken_columns(target.rewards or ()))
    check.warnings = [*report.notes, *(_placed(warning, places) for warning in report.warnings)]
    check.lengths = _measure(rows)
    if report.num_loss_tokens and not report.eos_in_loss:
        check.faults.append(
            f"no row has its end token {report.end_of_turn!r} in the loss, so the model would never learn to stop"
        )
    usable = _usable(part)
    places = usable.short_places()
    duplicates = find_duplicate_rows(_with_text(usable.rows, target), near)
    check.exact_duplicates, check.near_duplicates = (
        [[places[number] for number in group] for group in groups] for groups in duplicates
    )
    return check


def _usable(part: Part) -> Part:
    """Return the part without rows that cannot be tokenized, because rows without text would count as duplicates."""
    stay = [number for number in range(len(part.rows)) if number not in part.faulty_rows]
    return Part(part.name, [part.rows[number] for number in stay], [part.places[number] for number in stay])


def _count_turns(rows: list[Row], text_field: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in rows:
        columns = ["messages"] if "messages" in row and "prompt" not in row else ["prompt", "completion"]
        for column in [*columns, "chosen", "rejected"]:
            content = row.get(column, [])
            counts.update(["text"] if isinstance(content, str) else [turn["role"] for turn in to_messages(content, "")])
        counts["text"] += row.get(text_field) is not None and "messages" not in row and "prompt" not in row
    return {role: count for role, count in counts.most_common() if count}


def _with_text(rows: list[Row], target: CheckTarget) -> list[Row]:
    """Return the rows with their plain text in the column `text`."""
    name = target.text_field
    return rows if name == "text" else [row | {"text": row[name]} if row.get(name) is not None else row for row in rows]


def _measure(rows: list[list[Segment]]) -> dict[str, dict[str, int]]:
    lengths: dict[str, list[int]] = {}
    for row in rows:
        for segment in row:
            lengths.setdefault(segment.name, []).append(len(segment.tokens.token_ids))
    return {name: percentiles(values) for name, values in lengths.items()}


def _placed(text: str, places: list[str]) -> str:
    """Replace row numbers in a text by the rows' places."""
    return _ROW.sub(lambda match: places[int(match[1])] if int(match[1]) < len(places) else match[0], text)
