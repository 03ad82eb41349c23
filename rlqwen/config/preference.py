"""Configure what trainers that learn from preferences share: how their rows are tokenized."""

from typing import Any, Literal

from pydantic import Field

from rlqwen.config.base import PathText
from rlqwen.config.trainer import TrainerConfig


class PreferenceConfig(TrainerConfig):
    """Arguments that DPOTrainer and RewardTrainer share, for chosen and rejected answers."""

    max_length: int | None = Field(default=1024, ge=2)
    """Limit on prompt and answer together, in tokens. None: no limit."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longer prompts, in tokens, lose their beginning. None: no limit."""
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Which end of a longer sequence is kept. `drop` (ours) leaves the row out instead."""
    chat_template_path: PathText | None = None
    """A Jinja file, or a model whose chat template to use. None: the model's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, for example `{enable_thinking: false}`."""
    eos_token: str | None = None
    """Token that ends an answer. None: the tokenizer's."""
    pad_token: str | None = None
    """Accepted because TRL has it, and not used: batches are not padded."""
    disable_dropout: bool = True
    """Set every dropout probability of the model to 0."""
