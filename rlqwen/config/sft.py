"""Configure supervised fine-tuning."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlqwen.config.base import PathText
from rlqwen.config.evaluation import EvalGenerationConfig
from rlqwen.config.trainer import TrainerConfig
from rlqwen.plugins.kinds import LOSSES


class SFTConfig(TrainerConfig):
    """Configure SFTTrainer: maximize the likelihood of given answers.

    Names, meanings and defaults are TRL's unless a field says otherwise.
    """

    trainer: ClassVar[str] = "rlqwen.trainers.sft:SFTTrainer"
    next_command: ClassVar[str] = "rlqwen run GRPO_RECIPE model.path={final}     (rlqwen recipes lists recipes)"

    max_length: int | None = Field(default=1024, ge=2)
    """Longer sequences, in tokens, are truncated and counted. None: no limit."""
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Which end of a longer sequence is kept. `drop` (ours) leaves the row out instead."""
    packing: bool = False
    """Fill rows of `max_length` tokens with whole sequences (best fit); the batch size then counts such rows. Sequences
    never attend to each other, and batches are never padded, with or without this."""
    assistant_only_loss: bool | None = None
    """Compute the loss on assistant messages only. None (TRL: False): true if rows have `messages`."""
    completion_only_loss: bool | None = None
    """Compute the loss on the completion only. None: true if rows have `prompt` and `completion`."""
    dataset_text_field: str = "text"
    """Column of plain-text rows."""
    chat_template_path: PathText | None = None
    """A Jinja file, or a model whose chat template to use. None: the model's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, for example `{enable_thinking: false}`."""
    preserve_thinking: bool | None = None
    """Ours: thoughts in earlier assistant messages. None: what the template does (Qwen3's removes them). True: render
    and train each message as if it were the last. False: remove them, whatever the template does. The text before a
    `completion` is always what a server would send."""
    loss_type: str = "nll"
    """The loss of a target token: `nll`, another registered loss (`rlqwen losses`), `package.module:function` or
    `file.py:function`."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Ours: arguments of the loss that are not fields of this config."""
    eos_token: str | None = None
    """Token that ends an assistant message. None: the tokenizer's."""
    pad_token: str | None = None
    """Accepted because TRL has it, and not used: batches are not padded."""
    eval_generation: EvalGenerationConfig | None = None
    """Ours: also evaluate the text that the model generates, for example `{metrics: [exact_match, rouge], max_tokens:
    64}`. The metrics, such as `eval/rouge_l`, may be the `metric_for_best_model`. None: evaluate the loss only."""

    @model_validator(mode="after")
    def _loss_is_registered(self) -> "SFTConfig":
        LOSSES.check_name(self.loss_type, "loss_type")
        return self
