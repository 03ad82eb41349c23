"""Find duplicate rows, and prompts of evaluation rows in the training rows, equal or nearly equal as in cleaning."""

from collections.abc import Sequence

from rlqwen.data.cleaning.texts import compared_text, identity, question, verdict
from rlqwen.data.duplicates import find_exact_duplicates, find_near_duplicates, find_near_matches
from rlqwen.data.sources import Row

Groups = list[list[int]]
Pairs = list[tuple[int, int]]


def find_duplicate_rows(rows: Sequence[Row], threshold: float | None) -> tuple[Groups, Groups]:
    """Return (exact, near): groups of row indices from which the same, or nearly the same, is learned.

    Of exact duplicates only the first is compared for near ones. `threshold` None: exact duplicates only.
    """
    exact = find_exact_duplicates([identity(row) for row in rows])
    if threshold is None:
        return exact, []
    repeated = {number for group in exact for number in group[1:]}
    alike: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if number not in repeated:
            alike.setdefault(verdict(row), []).append(number)
    near = []
    for numbers in alike.values():
        groups = find_near_duplicates([compared_text(rows[number]) for number in numbers], threshold)
        near += [[numbers[place] for place in group] for group in groups]
    return exact, sorted(near)


def find_overlap(rows: Sequence[Row], others: Sequence[Row], threshold: float | None) -> tuple[Pairs, Pairs]:
    """Return (exact, near): (index in `rows`, index in `others`) of rows with the same, or nearly the same, prompt.

    A row with an exact match is not among the near ones.
    """
    asked, known = ([question(row) or "" for row in side] for side in (rows, others))
    first = {text: number for number, text in reversed(list(enumerate(known))) if text}
    exact = [(number, first[text]) for number, text in enumerate(asked) if text in first]
    if threshold is None:
        return exact, []
    rest = [number for number, text in enumerate(asked) if text not in first]
    near = find_near_matches([asked[number] for number in rest], known, threshold)
    return exact, [(rest[place], other) for place, other in near]
