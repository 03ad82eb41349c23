"""Tokenize rows as training would, by the trainers' own code, and split them into segments."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlqwen.config import OnlineConfig, PreferenceConfig, RewardConfig, SFTConfig
from rlqwen.config.batch_plan import prompt_room
from rlqwen.data import (
    DataReport,
    TokenizedRow,
    tokenize_labelled,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_reward_rows,
    tokenize_sft,
)
from rlqwen.data.sources import Row
from rlqwen.errors import DataError
from rlqwen.preflight.dataset.check_target import CheckTarget


@dataclass(frozen=True)
class Segment:
    """A stretch of a row that is shown and measured separately."""

    name: str
    """`row` for SFT; otherwise `prompt`, `chosen`, `rejected`, `good` or `bad`."""
    tokens: TokenizedRow


def segment_rows(
    rows: Sequence[Row], target: CheckTarget, faults: list[DataError]
) -> tuple[list[list[Segment]], DataReport]:
    """Return the segments of each row that training would keep, and what happened to the rows; collect faults."""
    tokenizer, config = target.tokenizer, target.config
    if isinstance(config, SFTConfig):
        sequences, report = tokenize_sft(rows, tokenizer, config, faults=faults)
        return [[Segment("row", sequence)] for sequence in sequences], report
    if isinstance(config, OnlineConfig):
        prompts, report = tokenize_prompts(
            rows,
            tokenizer,
            max_prompt_length=prompt_room(target.context, config) if target.context else config.max_prompt_length,
            overlong=config.overlong_prompts,
            chat_template_kwargs=config.chat_template_kwargs,
            faults=faults,
        )
        return [[_prompt(prompt.token_ids)] for prompt in prompts], report
    assert isinstance(config, PreferenceConfig)
    if target.kind == "labelled":
        labelled, report = tokenize_labelled(rows, tokenizer, config, faults=faults)
        return [
            [_prompt(row.prompt_ids), Segment("good" if row.label else "bad", row.completion)] for row in labelled
        ], report
    if isinstance(config, RewardConfig):
        pairs, report = tokenize_reward_rows(rows, tokenizer, config, faults=faults)
    else:
        pairs, report = tokenize_preferences(rows, tokenizer, config, faults=faults)
    return [
        [_prompt(pair.prompt_ids), Segment("chosen", pair.chosen), Segment("rejected", pair.rejected)] for pair in pairs
    ], report


def _prompt(token_ids: list[int]) -> Segment:
    return Segment("prompt", TokenizedRow(token_ids, [False] * len(token_ids)))
