"""Supervised fine-tuning."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlqwen.config.evaluation import EvalGenerationConfig
from rlqwen.config.trainer import TrainerConfig
from rlqwen.plugins.kinds import LOSSES


class SFTConfig(TrainerConfig):
    """Configure SFTTrainer: maximize the likelihood of given answers.

    Names, meanings and defaults are TRL's unless a field says otherwise.
    """

    trainer: ClassVar[str] = "rlqwen.trainers.sft:SFTTrainer"

    max_length: int | None = Field(default=1024, ge=2)
    """Longer sequences are truncated, and counted; None: never."""
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Which end of a longer sequence is kept; `drop` (ours) leaves the row out instead."""
    packing: bool = False
    """Fill rows of `max_length` tokens with whole sequences (best fit); the batch size then counts such rows.
    Sequences never see each other either way, and no batch is ever padded."""
    assistant_only_loss: bool | None = None
    """Loss on assistant turns only. None (TRL: False): yes where rows have `messages`."""
    completion_only_loss: bool | None = None
    """Loss on the completion only. None: yes where rows have `prompt` and `completion`."""
    dataset_text_field: str = "text"
    """Column of plain-text rows."""
    chat_template_path: str | None = None
    """A Jinja file, or a model whose chat template to use."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, for example `{enable_thinking: false}`."""
    preserve_thinking: bool | None = None
    """Ours: thoughts in the earlier turns of `messages`. None: as the template itself writes them (Qwen3's leaves them
    out); true: write and learn each turn as if it were the last; false: take them out, whatever the template does. What
    stands before a `completion` is always what serving sends."""
    loss_type: str = "nll"
    """The loss of a target token: `nll`, another registered loss (`rlqwen losses`), `package.module:function` or
    `file.py:function`."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Ours: arguments of the loss beyond this config's fields."""
    eos_token: str | None = None
    """Token that ends a turn. None: the tokenizer's."""
    pad_token: str | None = None
    """Accepted for TRL's sake: nothing is padded here."""
    eval_generation: EvalGenerationConfig | None = None
    """Ours: evaluate by what the model writes too, for example `{metrics: [exact_match, rouge], max_tokens: 64}`; its
    figures, such as `eval/rouge_l`, may be the `metric_for_best_model`."""

    @model_validator(mode="after")
    def _loss_is_registered(self) -> "SFTConfig":
        LOSSES.check_name(self.loss_type, "loss_type")
        return self
