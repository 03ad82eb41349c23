"""Configure what all trainers share, by the names and with the defaults of transformers.TrainingArguments."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlqwen.config.base import NO_EFFECT, ArgumentsConfig, PathText, Seed
from rlqwen.config.deepspeed import accumulation_of, adopt_ds_config
from rlqwen.config.parallel import ParallelConfig
from rlqwen.config.watch import WatchConfig, read_watch

Schedule = Literal["no", "steps", "epoch"]


class TrainerConfig(ArgumentsConfig):
    """Configure batch, optimizer, schedule, evaluation, saving and logging.

    A plugin's config derives from this or from OnlineConfig, and names its trainer. Fields marked `Ours` are not in
    TRL.
    """

    trainer: ClassVar[str] = ""
    """The trainer class that takes this config: `package.module:Class`, or `Class` in the module of this config. It is
    imported when training starts."""
    rewards: ClassVar[Literal["required", "optional", "refused"]] = "refused"
    """Whether a recipe of this algorithm lists rewards."""
    trains_scalar_model: ClassVar[bool] = False
    """Whether the trained model outputs one number, as a reward model does."""
    next_command: ClassVar[str] = "rlqwen eval {final} --data {recipe} -k 8"
    """Command that the end of a run suggests; `{final}` is the folder of the trained model, `{recipe}` the run's recipe."""

    refused: ClassVar[dict[str, str]] = {
        "use_liger_kernel": "logprobs are computed in chunks from hidden states already",
        "padding_free": "every batch is packed without padding already",
        "pad_to_multiple_of": "batches are packed without padding",
        "remove_unused_columns": "leave it out: reward functions get the columns that they name",
        "fsdp": "set parallel.engine to fsdp2",
        "push_to_hub": "upload the folder `final/` of the run with the hub's own tool",
        "dataloader_num_workers": "leave it out: rows are tokenized once, before training",
        "auto_find_batch_size": "set max_tokens_per_micro_batch, which bounds memory without changing the result",
        "logging_strategy": "use logging_steps",
        "activation_offloading": "use gradient_checkpointing and max_tokens_per_micro_batch",
    }

    output_dir: PathText | None = Field(default=None, json_schema_extra=NO_EFFECT)
    """The run folder. None: `runs/{algorithm}-{model name}`."""
    overwrite_output_dir: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """Start again in a folder that already holds a run, which is moved to `previous-N` inside it. False: refuse such a
    folder."""
    run_name: str | None = Field(default=None, json_schema_extra=NO_EFFECT)
    """Name of the run in the metric sinks. None: the run folder's name."""

    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Sequences (with GRPO and PPO: completions) per micro-batch. Times `gradient_accumulation_steps` and ranks, this
    is one update."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per update. The loss is normalized over the whole update, so that the split changes only
    rounding."""
    max_tokens_per_micro_batch: int | None = Field(default=None, ge=1)
    """Ours: split an update by packed tokens instead, which bounds memory whatever the lengths. None: split by
    sequences."""
    num_train_epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows, if `max_steps` is -1."""
    max_steps: int = -1
    """Optimizer updates of the run, with GRPO and PPO too. -1: `num_train_epochs` decides."""
    shuffle_dataset: bool = True
    """Visit the training rows in a new random order each epoch."""
    dataset_num_proc: int | None = Field(default=None, ge=1, json_schema_extra=NO_EFFECT)
    """Processes that tokenize rows. None: one, or one per CPU from 10,000 rows on."""

    learning_rate: float = Field(default=2e-5, ge=0)
    """Peak learning rate."""
    lr_scheduler_type: str = "linear"
    """A schedule of transformers.get_scheduler: linear, cosine, constant, constant_with_warmup, ..."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments of the schedule."""
    warmup_steps: float = Field(default=0, ge=0)
    """Updates over which the learning rate rises to its peak; below 1, a share of all updates."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """The same as a share of all updates."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit"] = "adamw_torch_fused"
    """The optimizer, which is AdamW. `adamw_torch_fused` updates in one kernel. `adamw_bnb_8bit`, or `adamw_8bit`, is that
    of bitsandbytes, whose moments have 8 bits (arXiv 2110.02861): 2 bytes per parameter instead of 8. It needs
    `rlqwen[quantization]`, and does not work with ZeRO."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of AdamW's mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator for numerical stability."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradient norm that larger gradients are scaled down to. 0: no clipping."""
    max_nonfinite_steps: int = Field(default=3, ge=1)
    """Ours: an update with a NaN or infinite loss or gradient is skipped; this many in a row stop the run."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Ours: how ranks share the model, its optimizer and each row."""
    bf16: bool | None = None
    """Compute in bfloat16 while trained weights stay float32. None: true on GPUs that support it, false on CPU."""
    fp16: bool = False
    """Compute in float16 with dynamic loss scaling, which keeps small gradients from underflowing; an update whose
    gradient overflows is skipped. For GPUs without bfloat16."""
    master_weights: bool = False
    """Ours, by the name of apex's and TransformerEngine's: hold trained matrices in bfloat16, as the forward reads them,
    and float32 masters of them in the optimizer, instead of casting float32 weights in each forward. On one H200 that
    took a tenth of an update's time away; it takes 2 more bytes per parameter, because gradients add up in float32. Needs
    `bf16`. ZeRO does so by itself."""
    gradient_checkpointing: bool | Literal["selective"] | None = None
    """Recompute activations in the backward pass to save memory. `selective` (ours): keep the outputs of attention, and
    recompute the rest. None: true on GPU, false on CPU."""
    full_determinism: bool = False
    """Take deterministic kernels in the backward pass on a GPU, so that equal runs, and a resumed one, are equal to the
    last bit. Slower. On a CPU runs are equal anyway."""
    use_cpu: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """Train on the CPU even if there is a GPU."""
    # The digest of the weights records what these gave.
    model_init_kwargs: dict[str, Any] = Field(default_factory=dict, json_schema_extra=NO_EFFECT)
    """Arguments of `from_pretrained` when the model is given by name or folder; `dtype` is that of frozen weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model or tokenizer."""
    disable_dropout: bool = False
    """Set every dropout probability of the model to 0."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the load-balancing loss of a mixture of experts; 0: none. None: the value in the model's config, or 0
    if the routers are frozen, as they are under LoRA."""
    logprob_chunk_size: int = Field(default=1024, ge=1)
    """Ours: number of tokens whose logits are in memory at the same time."""

    eval_strategy: Schedule = "no"
    """When to evaluate: never, every `eval_steps` updates, or after each epoch."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Updates between evaluations. None: `logging_steps`."""
    eval_on_start: bool = False
    """Evaluate before the first update, too."""
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    """Sequences per micro-batch in evaluation."""
    save_strategy: Schedule = Field(default="steps", json_schema_extra=NO_EFFECT)
    """When to save a checkpoint: never, every `save_steps` updates, or after each epoch."""
    save_steps: int = Field(default=500, ge=1, json_schema_extra=NO_EFFECT)
    """Updates between checkpoints."""
    save_total_limit: int | None = Field(default=None, ge=1, json_schema_extra=NO_EFFECT)
    """Number of checkpoints to keep: the newest, and the best. None: all."""
    save_keep_every: int | None = Field(default=None, ge=1, json_schema_extra=NO_EFFECT)
    """Ours: keep checkpoints of updates that are multiples of this forever, not counted in `save_total_limit`. None: no
    such checkpoints."""
    save_minutes: float | None = Field(default=None, gt=0, json_schema_extra=NO_EFFECT)
    """Ours: also save when this many minutes have passed since the last checkpoint. None: do not."""
    save_only_model: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """Leave optimizer and random states out of checkpoints; a run cannot resume from such checkpoints."""
    resume_from_checkpoint: bool | PathText | None = Field(default=None, json_schema_extra=NO_EFFECT)
    """Resume from a checkpoint. True: the newest complete one in the run folder. A string: the path of one. `auto`: as
    true if there is one, otherwise start. None or false: start."""
    resume_allow_changes: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """Ours: resume even if the data, the model, versions or keys that affect the result differ from the
    checkpoint's."""
    load_best_model_at_end: bool = False
    """Keep the best checkpoint by `metric_for_best_model`, and load it at the end."""
    metric_for_best_model: str | None = None
    """A key of the evaluation metrics, with or without `eval/`. None: the trainer's own choice, such as the loss (SFT,
    DPO) or the reward (GRPO, PPO)."""
    greater_is_better: bool | None = None
    """Whether a larger `metric_for_best_model` is better. None: true, except if its name ends in `loss` or
    `perplexity`, or if it counts what should be rare or short, such as `completions/truncated`, `reward/missing`,
    `label/unparsable` or `time`."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Ours: stop after this many evaluations without an improvement of `metric_for_best_model`. None: never."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """Smallest change of the metric that counts as an improvement."""

    logging_steps: int = Field(default=1, ge=1, json_schema_extra=NO_EFFECT)
    """Updates between two logged rows of metrics (TRL: 10)."""
    report_to: str | list[str] = Field(default="none", json_schema_extra=NO_EFFECT)
    """Metric sinks besides the JSONL file, which is always written: tensorboard, wandb, trackio, or none."""
    disable_tqdm: bool = Field(default=False, json_schema_extra=NO_EFFECT)
    """Print plain lines instead of a live display."""
    watch: WatchConfig = Field(default_factory=WatchConfig, json_schema_extra=NO_EFFECT)
    """Ours: symptoms to watch for while training, and what to do about them. `off`: watch for none."""
    seed: Seed = 42
    """Seed of data order, dropout, sampling and new weights."""

    @property
    def has_8bit_optimizer(self) -> bool:
        """Return whether the optimizer is that of bitsandbytes."""
        return self.optim in ("adamw_bnb_8bit", "adamw_8bit")

    @property
    def needs_reference(self) -> bool:
        """Return whether training compares the policy with a frozen reference."""
        return False

    def other_models(self) -> dict[str, str]:
        """Return the models that training needs besides the one that is trained: key of this config -> folder or hub id."""
        return {}

    def for_ranks(self, data_size: int) -> Self:
        """Return the config of a run whose batch is dealt out to `data_size` ranks (those that see different rows).

        Its `gradient_accumulation_steps` is what a ds_config's `train_batch_size` leaves to a rank. Raises ConfigError if
        the batch does not divide by the ranks; which config is valid does not depend on ranks otherwise.
        """
        given = self.gradient_accumulation_steps if "gradient_accumulation_steps" in self.model_fields_set else None
        found = accumulation_of(self.parallel.deepspeed, self.per_device_train_batch_size, given, data_size)
        return self if found is None else self.model_copy(update={"gradient_accumulation_steps": found})

    @model_validator(mode="before")
    @classmethod
    def _adopt_ds_config(cls, values: Any) -> Any:
        """Adopt what a ds_config says about our fields; `deepspeed` is TRL's name for it."""
        return adopt_ds_config(values) if isinstance(values, dict) else values

    @field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _read_bare_no(cls, value: Any) -> Any:
        """Read an unquoted `no`, which is False in YAML."""
        return "no" if value is False else value

    @field_validator("watch", mode="before")
    @classmethod
    def _read_watch(cls, value: Any) -> Any:
        return read_watch(value)

    @model_validator(mode="after")
    def _coherent(self) -> "TrainerConfig":
        if self.bf16 and self.fp16:
            raise ValueError("bf16=true and fp16=true exclude each other")
        if self.master_weights and (self.fp16 or self.bf16 is False):
            raise ValueError("master_weights=true keeps weights in bfloat16: set bf16=true, or leave it out")
        if self.master_weights and self.parallel.autotp_size > 1:
            raise ValueError(
                f"master_weights=true does not know shards of layers (parallel.autotp_size={self.parallel.autotp_size}): "
                "leave one of them out"
            )
        if self.master_weights and self.parallel.engine == "fsdp2":
            raise ValueError(
                "master_weights=true is what parallel.engine=fsdp2 does anyway, whose parts of the weights are float32 and "
                "which computes with rounded ones: leave it out"
            )
        if self.has_8bit_optimizer and (self.parallel.zero_stage or self.parallel.engine == "fsdp2"):
            raise ValueError(
                f"optim={self.optim!r} quantizes the moments of each weight by itself, and {self.parallel.cut_by} cuts "
                "weights anywhere: set optim to 'adamw_torch_fused', or let each rank hold whole weights"
            )
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
