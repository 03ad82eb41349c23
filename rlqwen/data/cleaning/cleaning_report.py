"""Report what cleaning did: one line of counts, and files with the dropped rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlqwen.data.cleaning.outcome import Outcome, Side
from rlqwen.data.cleaning.texts import Row, part_texts
from rlqwen.secrets import redact_values
from rlqwen.terminal import json_text

CLEANING_FILE = "data_cleaning.json"
DROPPED_FILE = "data_dropped.jsonl"

_MAX_NAMED = 1000
"""Largest number of dropped rows per reason that are written to the file."""
_EXCERPT = 300
_WARN_BELOW = 0.5
"""Fraction of kept rows below which the report has a warning."""


@dataclass(slots=True)
class CleaningReport:
    """Hold the counts of cleaning, and examples of dropped rows."""

    num_rows: int
    num_kept: int
    dropped: dict[str, int]
    """Config key that dropped rows -> number of rows, in the order of the steps."""
    masked: dict[Side, dict[str, int]]
    """Kind -> number of replacements."""
    num_masked_rows: dict[Side, int]
    from_cache: bool
    folder: Path | None
    """Folder with the cached outcome and the dropped rows; None if it could not be written."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Dropped rows, at most 1000 per reason: `row`, `reason`, `duplicate_of`, and the beginning of the text."""

    def summary(self) -> str:
        """Return the report as one line of text."""
        parts = [f"{self.num_kept} of {self.num_rows} rows kept"]
        parts += [f"{count} dropped by {reason}" for reason, count in self.dropped.items()]
        for side, counts in self.masked.items():
            if counts:
                kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
                parts.append(f"{kinds} masked in {self.num_masked_rows[side]} {side} rows")
        return "; ".join(parts) + (" (from the cache)" if self.from_cache else "")

    @property
    def warnings(self) -> list[str]:
        """Return a warning if cleaning dropped most of the rows."""
        if self.num_kept >= _WARN_BELOW * self.num_rows:
            return []
        most = max(self.dropped, key=self.dropped.__getitem__)
        return [f"cleaning dropped {1 - self.num_kept / self.num_rows:.0%} of the training rows, most by {most}"]

    def write(self, folder: Path) -> None:
        """Write the counts to `data_cleaning.json` and the dropped rows to `data_dropped.jsonl`."""
        counts = {
            "num_rows": self.num_rows,
            "num_kept": self.num_kept,
            "dropped": self.dropped,
            "masked": {
                side: {"rows": self.num_masked_rows[side], "replacements": kinds} for side, kinds in self.masked.items()
            },
            "cache": str(self.folder) if self.folder else None,
        }
        (folder / CLEANING_FILE).write_text(json_text(counts, indent=2) + "\n", "utf-8")
        with (folder / DROPPED_FILE).open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(json_text(redact_values(example)) + "\n" for example in self.examples)


def make_report(
    outcome: Outcome, rows: Sequence[Row], eval_rows: Sequence[Row] | None, *, folder: Path, from_cache: bool
) -> CleaningReport:
    """Build the report; `rows` are all rows, already masked, so that no file holds unmasked text."""
    sides: tuple[Side, ...] = ("train",) if eval_rows is None else ("train", "eval")
    masked_rows = Counter(masked.side for masked in outcome.masked)
    dropped = outcome.dropped_by_reason()
    return CleaningReport(
        num_rows=len(rows),
        num_kept=len(rows) - len(outcome.dropped),
        dropped=dropped,
        masked={side: outcome.masked_by_kind(side) for side in sides},
        num_masked_rows={side: masked_rows[side] for side in sides},
        from_cache=from_cache,
        folder=folder,
        examples=_examples(outcome, rows),
    )


def _examples(outcome: Outcome, rows: Sequence[Row]) -> list[dict[str, Any]]:
    named: Counter[str] = Counter()
    examples = []
    for one in outcome.dropped:
        named[one.reason] += 1
        if named[one.reason] <= _MAX_NAMED:
            example: dict[str, Any] = {"row": one.row, "reason": one.reason}
            if one.other_side is not None:
                example["duplicate_of"] = {"data": one.other_side, "row": one.other_row}
            text = "\n".join(part_texts(rows[one.row], "row"))
            examples.append(example | {"text": text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."})
    return examples
