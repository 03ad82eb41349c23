"""What the trainers that sample have in common: how completions are drawn, scored and corrected for."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlqwen.config.rollout import RolloutConfig, ScoringConfig
from rlqwen.config.trainer import TrainerConfig, launched_ranks
from rlqwen.errors import ConfigError

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# TRL spells these flat; here they belong to the rollout section.
_ROLLOUT_NAMES = {
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_tensor_parallel_size": "tensor_parallel_size",
    "vllm_max_model_length": "max_model_length",
}


class OnlineConfig(TrainerConfig):
    """Arguments of the trainers that learn from their own completions, GRPO and PPO."""

    refused: ClassVar[dict[str, str]] = TrainerConfig.refused | {
        "vllm_server_base_url": "workers are Ray actors; set rollout.ray_address for a cluster",
        "vllm_server_host": "workers are Ray actors; set rollout.ray_address for a cluster",
        "vllm_server_port": "workers are Ray actors; set rollout.ray_address for a cluster",
        "vllm_enable_sleep_mode": "set rollout.gpu_memory_utilization so that trainer and engine fit together",
        "use_transformers_paged": "use rollout={'engine': 'vllm'}",
        "log_completions": "leave it out: completions are always written to the run folder",
        "num_completions_to_print": "read them in completions/ of the run folder; the end of a run shows some",
    }

    learning_rate: float = Field(default=1e-6, ge=0)
    num_generations: int = Field(default=1, ge=1)
    """G: completions a prompt."""
    num_generations_eval: int | None = Field(default=None, ge=1)
    """Completions a prompt in evaluation. None: 1 (TRL: `num_generations`)."""
    max_completion_length: int = Field(default=512, ge=1)
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Prompts of more tokens are over-long. None: what the model's context leaves beside the completion."""
    overlong_prompts: Literal["drop", "refuse"] = "drop"
    """Ours: drop over-long prompts and say how many, or stop with an error that names the rows."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reward_weights: list[float] | None = None
    """A weight a reward function; None: 1 each."""

    vllm_importance_sampling_correction: bool = True
    """Correct for the gap between the sampler's and the trainer's logprobs (TIS)."""
    vllm_importance_sampling_mode: CorrectionMode = "sequence_mask"
    """Truncate or mask the correction, by token or by sequence. With `rollout.max_staleness` the default is
    `token_truncate`: over a whole sequence, a few updates' drift would mask too much."""
    vllm_importance_sampling_clip_max: float | None = Field(default=3.0, gt=0)
    vllm_importance_sampling_clip_min: float | None = Field(default=None, gt=0)

    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)

    @model_validator(mode="before")
    @classmethod
    def _accept_trl_names(cls, values: Any) -> Any:
        """Move TRL's flat vLLM arguments into the rollout section."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        rollout = values.get("rollout") or {}
        rollout = rollout.model_dump(exclude_unset=True) if isinstance(rollout, RolloutConfig) else dict(rollout)
        for theirs, ours in _ROLLOUT_NAMES.items():
            if theirs in values:
                rollout.setdefault(ours, values.pop(theirs))
        if "use_vllm" in values:
            rollout.setdefault("engine", "vllm" if values.pop("use_vllm") else "transformers")
        mode = values.pop("vllm_mode", "colocate")
        if mode != "colocate":
            raise ValueError(f"vllm_mode={mode!r}: workers are Ray actors; leave it out, or set rollout.ray_address")
        if rollout:
            values["rollout"] = rollout
        return values

    @model_validator(mode="after")
    def _divides(self) -> "OnlineConfig":
        self.check_batch(launched_ranks())
        return self

    @model_validator(mode="after")
    def _correct_what_is_stale(self) -> "OnlineConfig":
        lag = self.rollout.max_staleness
        if not lag:
            return self
        if not self.vllm_importance_sampling_correction:
            raise ValueError(
                f"rollout.max_staleness={lag} trains on groups of older weights, which importance weights must correct "
                "for: leave vllm_importance_sampling_correction on, or set max_staleness to 0"
            )
        if self.rollout.engine == "transformers":
            raise ValueError(
                f"rollout.max_staleness={lag} lets workers sample while the policy trains, but the transformers engine "
                "samples in the trainer's own process: set it to 0, or the engine to vllm"
            )
        if "vllm_importance_sampling_mode" not in self.model_fields_set:
            self.vllm_importance_sampling_mode = "token_truncate"
        return self

    def completions_per_update(self, num_ranks: int) -> int:
        """Completions that one optimizer update trains on."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_ranks

    def completions_per_rollout(self, num_ranks: int) -> int:
        """Completions that are sampled at a time, for one or more updates."""
        return self.completions_per_update(num_ranks)

    def check_batch(self, num_ranks: int) -> None:
        """ConfigError if the completions of a rollout don't make whole groups."""
        batch = self.completions_per_rollout(num_ranks)
        if batch % self.num_generations:
            raise ConfigError(
                f"{batch} completions a rollout ({self._rollout_terms(num_ranks)}) don't divide into groups of "
                f"num_generations={self.num_generations}; "
                f"nearest: {max(1, round(batch / self.num_generations)) * self.num_generations}"
            )

    def _rollout_terms(self, num_ranks: int) -> str:
        """What multiplies to the completions of a rollout."""
        return "per_device_train_batch_size x gradient_accumulation_steps" + (
            f" x {num_ranks} ranks" if num_ranks > 1 else ""
        )

    @property
    def passes_per_rollout(self) -> int:
        """How often each completion of a rollout is trained on."""
        return 1

    @property
    def total_completions(self) -> int | None:
        """Completions of the whole run, where it is limited by them."""
        return None
