"""Rows of DPO and its relatives: a prompt with a chosen and a rejected answer, or with one answer that has a label."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlqwen.config import DPOConfig
from rlqwen.data import LabelledRow, PreferenceRow
from rlqwen.data.views import Mapped
from rlqwen.errors import DataError
from rlqwen.packing.batch import Branch, Tree


@dataclass(slots=True)
class PreferenceExample:
    """One row: a prompt with a chosen and a rejected answer, in this order, or with one answer that has a label."""

    answers: Tree
    mismatched: Tree | None = None
    """For `kto`: the prompt with another row's answers."""


def to_comparison(row: PreferenceRow | LabelledRow) -> PreferenceExample:
    """A tokenised row as a tree."""
    if isinstance(row, LabelledRow):
        answers = [Branch(row.completion.token_ids, row.completion.loss_mask, per_sequence={"label": row.label})]
    else:
        sides = ((row.chosen, True), (row.rejected, False))
        answers = [Branch(side.token_ids, side.loss_mask, per_sequence={"label": label}) for side, label in sides]
    return PreferenceExample(Tree(row.prompt_ids, answers))


class PreferenceExamples(Mapped[PreferenceRow | LabelledRow, PreferenceExample]):
    """Tokenised rows as trees, made when they are asked for."""

    def __init__(self, rows: Sequence[PreferenceRow] | Sequence[LabelledRow]) -> None:
        super().__init__(rows, to_comparison)
        self.digest: str | None = getattr(rows, "digest", None)


def add_mismatched(rows: list[PreferenceExample]) -> None:
    """Give each row the answers of the nearest row before it, in a circle, that has another prompt."""
    for place, row in enumerate(rows):
        prompt = row.answers.prefix
        before = (rows[place - back].answers for back in range(1, len(rows)))
        other = next((answers for answers in before if answers.prefix != prompt), None)
        if other is None:
            raise DataError("kto compares answers with those to other prompts, but all rows have the same prompt")
        row.mismatched = Tree(
            prompt,
            [Branch(branch.token_ids, branch.loss_mask, per_sequence={"label": True}) for branch in other.branches],
        )


def are_pairs(rows: Sequence[PreferenceExample]) -> bool:
    """Whether each row has two answers."""
    return len(rows[0].answers.branches) == 2


def balance_warnings(rows: Sequence[PreferenceExample], args: DPOConfig) -> list[str]:
    """KTO wants the weighted numbers of good and bad answers to be about equal (arXiv 2402.01306, eq. 8)."""
    labels = [branch.per_sequence["label"] for row in rows for branch in row.answers.branches]
    good, bad = labels.count(True), labels.count(False)
    ratio = good * args.desirable_weight / max(bad * args.undesirable_weight, 1e-9)
    if good == bad or 0.99 <= ratio <= 1.34:
        return []
    asked = "kto asks for desirable_weight * good / (undesirable_weight * bad) between 1 and 4/3"
    return [f"{good} good and {bad} bad answers: {asked}, and it is {ratio:.3g}"]
