"""What the trainers that learn from preferences have in common: how their rows are tokenised."""

from typing import Any, Literal

from pydantic import Field

from rlqwen.config.trainer import TrainerConfig


class PreferenceConfig(TrainerConfig):
    """Arguments of the trainers that learn from chosen and rejected answers, DPO and reward modelling."""

    max_length: int | None = Field(default=1024, ge=2)
    """Tokens of prompt and answer together; None: no limit."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longer prompts lose their beginning; None: never."""
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Which end of a longer sequence is kept; `drop` (ours) leaves the row out instead."""
    chat_template_path: str | None = None
    """A Jinja file, or a model whose chat template to use."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, for example `{enable_thinking: false}`."""
    eos_token: str | None = None
    """Token that ends a text. None: the tokenizer's."""
    pad_token: str | None = None
    """Accepted for TRL's sake: nothing is padded here."""
    disable_dropout: bool = True
