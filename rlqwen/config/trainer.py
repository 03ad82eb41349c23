"""What every trainer's config has: names, meanings and defaults of transformers.TrainingArguments unless said here."""

import os
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlqwen.config.base import NO_EFFECT, ArgumentsConfig
from rlqwen.config.deepspeed import adopt_ds_config
from rlqwen.config.parallel import ParallelConfig
from rlqwen.config.watch import WatchConfig, read_watch

Schedule = Literal["no", "steps", "epoch"]


def launched_ranks() -> int:
    """How many processes a launcher has started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class TrainerConfig(ArgumentsConfig):
    """Batch, optimizer, schedule, evaluation, saving and logging.

    A plugin's config derives from this or from OnlineConfig, and names its trainer.
    """

    trainer: ClassVar[str] = ""
    """The trainer class that takes this config: `package.module:Class`, or `Class` in the module of this config. It is
    imported when training starts."""
    rewards: ClassVar[Literal["required", "optional", "refused"]] = "refused"
    """Whether a recipe of this algorithm names rewards."""
    trains_scalar_model: ClassVar[bool] = False
    """Whether the model that is trained has one number as its output, as a reward model does."""

    refused: ClassVar[dict[str, str]] = {
        "use_liger_kernel": "logprobs are computed in chunks from hidden states already",
        "padding_free": "every batch is packed without padding already",
        "pad_to_multiple_of": "batches are packed without padding",
        "remove_unused_columns": "leave it out: reward functions get the columns that they name",
        "fsdp": "set parallel.zero_stage to 3, which shards weights as FSDP does",
        "push_to_hub": "upload the folder `final/` of the run with the hub's own tool",
        "dataloader_num_workers": "leave it out: rows are tokenised once, before training",
        "auto_find_batch_size": "set max_tokens_per_micro_batch, which bounds memory without changing the result",
        "logging_strategy": "use logging_steps",
        "activation_offloading": "use gradient_checkpointing and max_tokens_per_micro_batch",
    }

    output_dir: str | None = Field(default=None, json_schema_extra=NO_EFFECT)
    """The run folder. None: `runs/{algorithm}-{model name}`."""
    overwrite_output_dir: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """Start anew in a folder that holds a run already, which is moved aside to `previous-N` in it; otherwise that is
    refused."""
    run_name: str | None = Field(default=None, json_schema_extra=NO_EFFECT)
    """Name of the run for the metric sinks. None: the run folder's name."""

    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Sequences (GRPO: completions) a micro-batch; times `gradient_accumulation_steps` and ranks gives one update."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches an update. The loss is normalised over the whole update, so the split changes only rounding."""
    max_tokens_per_micro_batch: int | None = Field(default=None, ge=1)
    """Ours: split an update by packed tokens instead, so that memory is bounded whatever the lengths."""
    num_train_epochs: float = Field(default=3.0, gt=0)
    max_steps: int = -1
    """Optimizer updates (GRPO: as in TRL, also updates); -1: as `num_train_epochs` says."""
    shuffle_dataset: bool = True
    dataset_num_proc: int | None = Field(default=None, ge=1, json_schema_extra=NO_EFFECT)
    """Processes that tokenise. None: one, or from 10,000 rows on one per CPU."""

    learning_rate: float = Field(default=2e-5, ge=0)
    lr_scheduler_type: str = "linear"
    """A name that transformers.get_scheduler knows: linear, cosine, constant, constant_with_warmup, ..."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    warmup_steps: float = Field(default=0, ge=0)
    """Warm-up updates; below 1, a share of all updates."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Warm-up as a share of all updates."""
    optim: Literal["adamw_torch", "adamw_torch_fused"] = "adamw_torch_fused"
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradient norm is clipped to this; 0: not clipped."""
    max_nonfinite_steps: int = Field(default=3, ge=1)
    """Ours: an update with a NaN or infinite loss or gradient is skipped; so many in a row stop the run."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Ours: what the ranks share out among them."""
    bf16: bool | None = None
    """Compute in bfloat16 while trained weights stay float32. None: on GPUs that have it, not on CPU."""
    fp16: bool = False
    """Compute in float16, the loss scaled so that small gradients do not vanish; an update whose gradient overflows is
    skipped. For GPUs without bfloat16."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass to save memory. None: on GPU, not on CPU."""
    use_cpu: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """Train on the CPU even where there is a GPU."""
    # The digest of the weights records what these gave.
    model_init_kwargs: dict[str, Any] = Field(default_factory=dict, json_schema_extra=NO_EFFECT)
    """Passed to `from_pretrained` when the model is given as a name or folder; `dtype` is that of frozen weights."""
    trust_remote_code: bool = False
    disable_dropout: bool = False
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the load-balancing loss of a mixture of experts. None: the model config's own, but 0 where the routers
    are frozen, as they are under LoRA; 0: off."""
    logprob_chunk_size: int = Field(default=1024, ge=1)
    """Ours: tokens whose logits exist at the same time."""

    eval_strategy: Schedule = "no"
    eval_steps: int | None = Field(default=None, ge=1)
    """Updates between evaluations; None: `logging_steps`."""
    eval_on_start: bool = False
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    save_strategy: Schedule = Field(default="steps", json_schema_extra=NO_EFFECT)
    save_steps: int = Field(default=500, ge=1, json_schema_extra=NO_EFFECT)
    save_total_limit: int | None = Field(default=None, ge=1, json_schema_extra=NO_EFFECT)
    """Keep only so many checkpoints, the newest and the best."""
    save_keep_every: int | None = Field(default=None, ge=1, json_schema_extra=NO_EFFECT)
    """Ours: keep the checkpoints of updates that this divides for good, not counted in `save_total_limit`."""
    save_minutes: float | None = Field(default=None, gt=0, json_schema_extra=NO_EFFECT)
    """Ours: save whenever so many minutes have passed since the last checkpoint, too."""
    save_only_model: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """Leave optimiser and random states out of checkpoints, from which a run then cannot go on."""
    resume_from_checkpoint: bool | str | None = Field(default=None, json_schema_extra=NO_EFFECT)
    """Go on from a checkpoint: true: the newest complete one of the run folder; or the path of one.
    `auto`: true where there is one, else begin."""
    resume_allow_changes: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """Ours: go on although data, model, versions or keys that change the result are not those of the checkpoint."""
    load_best_model_at_end: bool = False
    """Keep the best checkpoint by `metric_for_best_model` and go back to it at the end."""
    metric_for_best_model: str | None = None
    """A key of the evaluation metrics, with or without `eval/`. None: the loss (SFT, DPO), the reward (GRPO)."""
    greater_is_better: bool | None = None
    """None: unless the metric's name ends in `loss` or `perplexity`, or counts what should be rare or short, such as
    `completions/truncated`, `reward/missing`, `label/unparsable` or `time`."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Ours: stop after so many evaluations without an improvement of `metric_for_best_model`."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """What counts as an improvement."""

    logging_steps: int = Field(default=1, ge=1, json_schema_extra=NO_EFFECT)
    """Updates between two lines of metrics (TRL: 10)."""
    report_to: str | list[str] = Field(default="none", json_schema_extra=NO_EFFECT)
    """Metric sinks beside the JSONL file that is always written: tensorboard, wandb, trackio, or none."""
    disable_tqdm: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """No live display, plain lines only."""
    watch: WatchConfig = Field(default_factory=WatchConfig, json_schema_extra=NO_EFFECT)
    """Ours: what to look out for while training, and what to do then. `off`: nothing."""
    seed: int = 42

    @property
    def needs_reference(self) -> bool:
        """Whether training compares the policy with a frozen reference."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _adopt_ds_config(cls, values: Any) -> Any:
        """`deepspeed` is TRL's name; what a ds_config says counts like a field."""
        return adopt_ds_config(values, launched_ranks()) if isinstance(values, dict) else values

    @field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _read_bare_no(cls, value: Any) -> Any:
        """An unquoted `no` is False in YAML."""
        return "no" if value is False else value

    @field_validator("watch", mode="before")
    @classmethod
    def _read_watch(cls, value: Any) -> Any:
        return read_watch(value)

    @model_validator(mode="after")
    def _coherent(self) -> "TrainerConfig":
        if self.bf16 and self.fp16:
            raise ValueError("bf16=true and fp16=true exclude each other")
        needs_eval = [
            name
            for name, given in (
                ("load_best_model_at_end", self.load_best_model_at_end),
                ("early_stopping_patience", self.early_stopping_patience is not None),
            )
            if given
        ]
        if needs_eval and self.eval_strategy == "no":
            raise ValueError(f"{needs_eval[0]} needs evaluations; set eval_strategy to 'steps' or 'epoch'")
        return self
