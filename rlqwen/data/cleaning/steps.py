"""Run the steps of cleaning in order; each step sees only rows that earlier steps kept."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rlqwen.config.cleaning import CleaningConfig, MaskKind
from rlqwen.data.cleaning.filters import RowFilter
from rlqwen.data.cleaning.masking import mask_text
from rlqwen.data.cleaning.outcome import DroppedRow, MaskedRow, Outcome, Side
from rlqwen.data.cleaning.texts import TRAINED, Row, compared_text, identity, question, verdict
from rlqwen.data.duplicates import find_exact_duplicates, find_near_duplicates, find_near_matches

_PROGRESS_AFTER_S = 3.0


def find_outcome(rows: Sequence[Row], eval_rows: Sequence[Row] | None, config: CleaningConfig) -> Outcome:
    """Compute what the config does to these rows, without changing them."""
    outcome = Outcome()
    outcome.masked += _mask(rows, "train", config.mask)
    outcome.masked += _mask(eval_rows or (), "eval", config.mask)
    rows = outcome.apply(rows, "train")
    row_filter = RowFilter(config)
    row_filter.check_parts(rows)
    reasons = ((number, row_filter.reason(row)) for number, row in enumerate(rows))
    outcome.dropped += [DroppedRow(number, reason) for number, reason in reasons if reason]
    if config.exact_duplicates:
        outcome.dropped += _exact(rows, outcome.survivors(len(rows)))
    if config.near_duplicates:
        outcome.dropped += _near(rows, outcome.survivors(len(rows)), config.near_duplicates.threshold)
    if config.drop_eval_overlap and eval_rows:
        masked_eval = outcome.apply(eval_rows, "eval")
        outcome.dropped += _overlap(rows, outcome.survivors(len(rows)), masked_eval, config)
    return outcome


def _mask(rows: Sequence[Row], side: Side, kinds: Sequence[MaskKind]) -> list[MaskedRow]:
    from tqdm import tqdm

    if not kinds:
        return []
    found = []
    for number, row in enumerate(tqdm(rows, desc="Masking", unit="row", delay=_PROGRESS_AFTER_S, disable=None)):
        counts: Counter[str] = Counter()
        columns = {column: _mask_strings(row[column], kinds, counts) for column in TRAINED if column in row}
        if counts:
            changed = {column: value for column, value in columns.items() if value != row[column]}
            found.append(MaskedRow(side, number, changed, dict(counts)))
    return found


def _mask_strings(value: Any, kinds: Sequence[MaskKind], counts: Counter[str]) -> Any:
    """Return the value with every nested string masked, except keys of mappings."""
    if isinstance(value, str):
        text, found = mask_text(value, kinds)
        counts.update(found)
        return text
    if isinstance(value, dict):
        return {key: _mask_strings(inner, kinds, counts) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mask_strings(inner, kinds, counts) for inner in value]
    return value


def _exact(rows: Sequence[Row], survivors: Iterable[int]) -> list[DroppedRow]:
    numbers = list(survivors)
    groups = find_exact_duplicates([identity(rows[number]) for number in numbers])
    return _all_but_first(groups, numbers, "exact_duplicates")


def _near(rows: Sequence[Row], survivors: Iterable[int], threshold: float) -> list[DroppedRow]:
    """Find near duplicates among rows with the same verdict, because a sum with another solution is another sum."""
    alike: dict[str, list[int]] = {}
    for number in survivors:
        alike.setdefault(verdict(rows[number]), []).append(number)
    dropped = []
    for numbers in alike.values():
        groups = find_near_duplicates([compared_text(rows[number]) for number in numbers], threshold)
        dropped += _all_but_first(groups, numbers, "near_duplicates")
    return sorted(dropped, key=lambda one: one.row)


def _all_but_first(groups: list[list[int]], numbers: list[int], reason: str) -> list[DroppedRow]:
    dropped = [
        DroppedRow(numbers[index], reason, "train", numbers[first]) for first, *others in groups for index in others
    ]
    return sorted(dropped, key=lambda one: one.row)


def _overlap(
    rows: Sequence[Row], survivors: Iterable[int], eval_rows: Sequence[Row], config: CleaningConfig
) -> list[DroppedRow]:
    """Find rows with the question of an eval row; answers are ignored, because knowing the question helps already."""
    train = {number: text for number in survivors if (text := question(rows[number])) is not None}
    held_out = {number: text for number, text in enumerate(map(question, eval_rows)) if text is not None}
    first_of = {text: number for number, text in reversed(held_out.items())}
    matches = {number: first_of[text] for number, text in train.items() if text in first_of}
    if config.near_duplicates:
        remaining = [number for number in train if number not in matches]
        eval_numbers = list(held_out)
        threshold = config.near_duplicates.threshold
        near = find_near_matches([train[number] for number in remaining], list(held_out.values()), threshold)
        matches |= {remaining[index]: eval_numbers[match] for index, match in near}
    return [DroppedRow(number, "drop_eval_overlap", "eval", matches[number]) for number in sorted(matches)]
