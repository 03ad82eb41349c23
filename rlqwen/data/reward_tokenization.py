"""Tokenize reward-model rows: whole conversations, rendered by the tokenizer's own chat template.

A policy is trained on segments that its generation must reproduce (rlqwen.data.chat). A reward model may be called by
anyone who has a conversation and a tokenizer, so training and scoring both use the output of `apply_chat_template`.
"""

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from rlqwen.config.reward import RewardConfig
from rlqwen.data.control_tokens import ControlTokenEscaper, TemplateSegment, control_tokens
from rlqwen.data.data_report import DataReport
from rlqwen.data.format_counts import FormatCounts, describe
from rlqwen.data.messages import to_messages, without_loss_marks
from rlqwen.data.preference_renderer import AnswersRenderer
from rlqwen.data.preference_rows import PreferenceRow
from rlqwen.data.preference_tokenization import PairJob
from rlqwen.data.reasoning import reads_think_tags, thoughts_in_content, thoughts_in_field
from rlqwen.data.renderer import Renderer
from rlqwen.data.template_source import default_template, load_chat_template, refusals
from rlqwen.data.tokenization import tokenize_all
from rlqwen.data.tokenization_job import TokenizationStats
from rlqwen.errors import DataError
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def reward_model_segments(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | list[Message],
    completion: str | list[Message],
    tools: Any = None,
    *,
    is_sampled: bool = False,
    where: str = "conversation",
) -> list[TemplateSegment]:
    """Return segments of a prompt and its answer for a reward model; texts are joined without an EOS token.

    Control tokens inside messages are ordinary text. They are ordinary text in a plain-text answer too if a policy
    sampled it (`is_sampled`), because the policy could otherwise end its turn and write a second one that praises the
    first. In plain text of a dataset they act as tokens.
    """
    escaper = ControlTokenEscaper(control_tokens(tokenizer))
    if isinstance(prompt, str) and isinstance(completion, str):
        first = escaper.first(completion) if is_sampled else None
        if first is None:
            return [TemplateSegment(prompt + completion, True, in_loss=True)]
        text, escaped = escaper.escape(completion[first:])
        return [
            TemplateSegment(prompt + completion[:first], True, in_loss=True),
            *escaped.segments(text, in_loss=True),
        ]
    answer = to_messages(completion, "assistant")
    if "reasoning_content" not in default_template(tokenizer):  # such a template would drop the key
        answer = [thoughts_in_content(turn) for turn in answer]
    elif any("</think>" in turn["content"] for turn in answer) and not reads_think_tags(
        partial(_render, tokenizer, where="chat template")
    ):
        answer = [thoughts_in_field(turn) for turn in answer]
    messages = without_loss_marks([*to_messages(prompt, "user"), *answer])
    (messages, tools), escaped = escaper.escape((messages, tools))
    rendered = _render(tokenizer, messages, tools, where=where)
    return escaped.segments(rendered, in_loss=True)


def _render(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: Any = None, *, where: str) -> str:
    with refusals(messages, where):
        return str(tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False))


def tokenize_reward_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    config: RewardConfig,
    *,
    faults: list[DataError] | None = None,
) -> tuple[Sequence[PreferenceRow], DataReport]:
    """Tokenize rows to pairs, in order, as `tokenize_preferences` does, but render each conversation as a whole.

    The prompt of a pair is the common prefix of the tokens of both sides.
    """
    return tokenize_all(rows, RewardJob(tokenizer, config), faults=faults, num_proc=config.dataset_num_proc)


class RewardJob(PairJob):
    """Tokenize rows to pairs for a reward model."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: RewardConfig) -> None:
        if config.chat_template_path is not None:  # the trained model's tokenizer gets this template
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = load_chat_template(config.chat_template_path)
        super().__init__(tokenizer, config)

    @cached_property
    def renderer(self) -> "AnswersRenderer":
        return _RewardModelRenderer(self.tokenizer, self.config)

    def items(self, kept: list[Any], stats: TokenizationStats) -> list[PreferenceRow]:
        pairs = super().items(kept, stats)
        # A reward model generates nothing, so the end token of its sequences does not matter.
        stats.report.num_loss_tokens, stats.counts["ended"] = 0, 0
        stats.report.rows.pop("no_end", None)
        for pair in pairs:
            _move_prefix_to_prompt(pair)
        stats.report.num_tokens = sum(
            len(pair.prompt_ids) + len(pair.chosen.token_ids) + len(pair.rejected.token_ids) for pair in pairs
        )
        return pairs


class _RewardModelRenderer(Renderer):
    """Render each side as a whole conversation with an empty prompt."""

    def segments(
        self, prompt: str | list[Message], completions: list[str | list[Message]], tools: Any, where: str
    ) -> list[list[TemplateSegment]]:
        if any(not isinstance(one, str) for one in (prompt, *completions)):
            # `format` refuses a template that training cannot use, and loads the one of chat_template_path.
            completions = [self.format.place_thoughts(to_messages(one, "assistant")) for one in completions]
        return [
            [],
            *(reward_model_segments(self._tokenizer, prompt, one, tools, where=where) for one in completions),
        ]

    def describe(self, report: DataReport, counts: FormatCounts) -> None:
        """Add to the report only which rows are plain text, because a conversation is read in full."""
        hint = "for a chat model use messages, or set a system_prompt for the data source, which makes messages of text"
        text = FormatCounts(num_rows=counts.num_rows, num_text=counts.num_text)
        describe(report, text, preserves=True, hint=hint, unlike_trl=[])

    def warnings(self) -> list[str]:
        return self.template_warnings()


def _move_prefix_to_prompt(pair: PreferenceRow) -> None:
    """Move the common prefix of both sides into the prompt; each side keeps at least one token."""
    chosen, rejected = pair.chosen.token_ids, pair.rejected.token_ids
    limit = min(len(chosen), len(rejected)) - 1
    common = next((index for index in range(limit) if chosen[index] != rejected[index]), max(limit, 0))
    pair.prompt_ids = chosen[:common]
    for side in (pair.chosen, pair.rejected):
        side.token_ids, side.loss_mask = side.token_ids[common:], side.loss_mask[common:]
