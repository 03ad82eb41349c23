"""Make trees of preference rows: a prompt with a chosen and a rejected answer, or with one labeled answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlqwen.config import DPOConfig
from rlqwen.data import LabelledRow, PreferenceRow
from rlqwen.data.views import Mapped
from rlqwen.errors import DataError
from rlqwen.packing.batch import Branch, Tree


@dataclass(slots=True)
class PreferenceExample:
    """One row: a prompt with a chosen and a rejected answer, in this order, or with one labeled answer."""

    answers: Tree
    kl_answers: Tree | None = None
    """The prompt with the answers of another row, by which `kto` estimates the KL; None for other losses."""


def to_example(row: PreferenceRow | LabelledRow) -> PreferenceExample:
    """Return a tokenized row as a tree."""
    if isinstance(row, LabelledRow):
        answers = [Branch(row.completion.token_ids, row.completion.loss_mask, per_sequence={"label": row.label})]
    else:
        sides = ((row.chosen, True), (row.rejected, False))
        answers = [Branch(side.token_ids, side.loss_mask, per_sequence={"label": label}) for side, label in sides]
    return PreferenceExample(Tree(row.prompt_ids, answers))


class PreferenceExamples(Mapped[PreferenceRow | LabelledRow, PreferenceExample]):
    """Tokenized rows as trees, each made when it is read."""

    def __init__(self, rows: Sequence[PreferenceRow] | Sequence[LabelledRow]) -> None:
        super().__init__(rows, to_example)
        self.digest: str | None = getattr(rows, "digest", None)


def add_kl_answers(rows: list[PreferenceExample]) -> None:
    """Give each row the answers of the nearest earlier row with another prompt; before the first row comes the last.

    Raises DataError if all rows have the same prompt.
    """
    for place, row in enumerate(rows):
        prompt = row.answers.prefix
        before = (rows[place - back].answers for back in range(1, len(rows)))
        other = next((answers for answers in before if answers.prefix != prompt), None)
        if other is None:
            raise DataError("kto compares answers with those to other prompts, but all rows have the same prompt")
        row.kl_answers = Tree(
            prompt,
            [Branch(branch.token_ids, branch.loss_mask, per_sequence={"label": True}) for branch in other.branches],
        )


def are_pairs(rows: Sequence[PreferenceExample]) -> bool:
    """Return whether each row has two answers."""
    return len(rows[0].answers.branches) == 2


def balance_warnings(rows: Sequence[PreferenceExample], args: DPOConfig) -> list[str]:
    """Return a warning if the weighted numbers of good and bad answers are too unequal for KTO (arXiv 2402.01306, eq. 8)."""
    labels = [branch.per_sequence["label"] for row in rows for branch in row.answers.branches]
    good, bad = labels.count(True), labels.count(False)
    ratio = good * args.desirable_weight / max(bad * args.undesirable_weight, 1e-9)
    if good == bad or 0.99 <= ratio <= 1.34:
        return []
    asked = "kto asks for desirable_weight * good / (undesirable_weight * bad) between 1 and 4/3"
    return [f"{good} good and {bad} bad answers: {asked}, and it is {ratio:.3g}"]
