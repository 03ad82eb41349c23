"""Compute accuracy and F1 of completions that name one of a few labels."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlqwen.errors import DataError
from rlqwen.evaluation.metrics.answer_extraction import after_reasoning, marked_answer, normalize_answer

_MAX_LABELS = 100
# A letter or digit, except kana and Chinese characters.
_SPACED = r"[^\W\u3040-\u9fff]"


@dataclass(frozen=True)
class LabelMetrics:
    """Accuracy and F1 of the labels found in all texts."""

    accuracy: float
    """Share of texts with the right label; a text without a label counts as wrong."""
    macro_f1: float
    """Mean of F1 over the labels that were expected or found."""
    micro_f1: float
    """F1 of all labels together; it is the accuracy if every text has a label."""
    unparsable: float
    """Share of texts in which no label, or more than one, was found."""


def label_set(references: Sequence[Sequence[str]], labels: Sequence[str] | None) -> list[str]:
    """Return the labels to choose from, normalized: those given, or all that the rows have.

    `references`: the right answers of every row. Raises DataError for rows whose answer cannot be a label.
    """
    for number, several in enumerate(references):
        if len(several) != 1:
            raise DataError(f"row {number}: one label is right, but the reference column has {several!r:.80}")
    expected = [normalize_answer(one) for (one,) in references]
    known = list(dict.fromkeys(expected if labels is None else map(normalize_answer, labels)))
    if labels is None and len(known) > _MAX_LABELS:
        raise DataError(
            f"metric 'label': the reference column has {len(known)} different values, such as "
            f"{references[0][0]!r:.60}, so they are hardly labels; name the labels' column as the reference, or list "
            "the labels"
        )
    for number, label in enumerate(expected):
        if label not in known:
            raise DataError(f"row {number}: {references[number][0]!r:.80} is none of the labels {', '.join(known)}")
    return known


def find_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the label, one of the normalized `labels`, that a text names; None if it names none, or several.

    It is what the text marks as its answer, or all of the text after the thoughts, if that is a label; else the only
    label that the text contains as a separate word, a single letter only as a capital. A label inside a longer label
    does not count.
    """
    text = after_reasoning(text)
    marked = marked_answer(text)
    answer = text if marked is None else marked
    if normalize_answer(answer) in labels:
        return normalize_answer(answer)
    answer = " ".join(unicodedata.normalize("NFKC", answer).split())
    found = set()
    for label in sorted(labels, key=len, reverse=True):
        answer, count = _as_word(label).subn("\0", answer)
        if count:
            found.add(label)
    return found.pop() if len(found) == 1 else None


def _as_word(label: str) -> re.Pattern[str]:
    """Match the label with no letter or digit of a script with spaces beside it; Chinese has no spaces to look for."""
    before = rf"(?<!{_SPACED})" if re.match(_SPACED, label) else ""
    after = rf"(?!{_SPACED})" if re.match(_SPACED, label[-1]) else ""
    if len(label) == 1:
        return re.compile(f"{before}{re.escape(label.upper())}{after}")  # "a" is an article, "A" rather a choice
    return re.compile(f"{before}{re.escape(label)}{after}", re.IGNORECASE)


def label_metrics(found: Sequence[str | None], expected: Sequence[str]) -> LabelMetrics:
    """Compare the labels that texts name (None: unparsable) with those expected.

    F1 of a label is 2 TP / (2 TP + FP + FN); micro-F1 is the same of the sums over labels. An unparsable text is a
    false negative of its label and a false positive of none.
    """
    right = Counter(one for one, other in zip(found, expected, strict=True) if one == other)
    num_found = Counter(one for one in found if one is not None)
    num_expected = Counter(expected)
    scores = [2 * right[label] / (num_found[label] + num_expected[label]) for label in num_found | num_expected]
    num_right = sum(right.values())
    return LabelMetrics(
        accuracy=num_right / len(expected),
        macro_f1=sum(scores) / len(scores),
        micro_f1=2 * num_right / (num_found.total() + len(expected)),
        unparsable=sum(one is None for one in found) / len(expected),
    )
