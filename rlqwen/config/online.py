"""Configure what trainers that sample share: how completions are sampled, scored and corrected for."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlqwen.config.base import NO_EFFECT, section_values
from rlqwen.config.generation import GenerationKwargs, read_generation_kwargs
from rlqwen.config.rollout import RolloutConfig, ScoringConfig
from rlqwen.config.trainer import TrainerConfig
from rlqwen.errors import ConfigError
from rlqwen.types import Truncation

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# TRL spells these flat; here they belong to the rollout section.
_ROLLOUT_NAMES = {
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_tensor_parallel_size": "tensor_parallel_size",
    "vllm_max_model_length": "max_model_length",
    "vllm_enable_sleep_mode": "sleep",
}

# TRL's arguments, at its defaults and other values that change nothing here.
_AS_ALWAYS: dict[str, tuple[Any, ...]] = {
    "vllm_mode": ("colocate",), "vllm_model_impl": ("vllm",),
    "vllm_structured_outputs_regex": (None,), "vllm_server_base_url": (None,), "vllm_server_host": ("0.0.0.0",),
    "vllm_server_port": (8000,), "vllm_server_timeout": (240,), "vllm_group_port": (51216,),
    "vllm_importance_sampling_cap": (None,),
    "use_transformers_paged": (False,), "use_transformers_continuous_batching": (False,),
    "transformers_continuous_batching_config": (None,), "cache_implementation": (None,), "log_completions": (True,),
    "ds3_gather_for_generation": (True,),
}  # fmt: skip

_ON_A_CLUSTER = "workers are Ray actors; set rollout.ray_address for a cluster"

COUNTED_BY = {"token_mean": "tokens", "sequence_mean": "sequences", "constant_length": "sequences"}
"""Normalizer of a loss -> the one count of the whole update that it divides by."""

# Settings that the trainer cannot reproduce: they depend on earlier tokens, or on more than the distribution.
_UNCOMPARABLE = ("min_tokens", "presence_penalty", "frequency_penalty", "bad_words", "logit_bias", "allowed_token_ids")


class OnlineConfig(TrainerConfig):
    """Arguments of trainers that learn from the policy's own completions, such as GRPO and PPO."""

    rewards: ClassVar[Literal["required", "optional", "refused"]] = "required"
    refused: ClassVar[dict[str, str]] = TrainerConfig.refused | {
        "vllm_mode": _ON_A_CLUSTER,
        "vllm_server_base_url": _ON_A_CLUSTER,
        "vllm_server_host": _ON_A_CLUSTER,
        "vllm_server_port": _ON_A_CLUSTER,
        "vllm_server_timeout": "set rollout.start_timeout",
        "vllm_group_port": "leave it out: rollout.weight_transfer chooses how weights travel",
        "vllm_model_impl": "leave it out: workers run vLLM's own models",
        "vllm_structured_outputs_regex": "constrained decoding is not supported: reward the format, or give "
        "generation_kwargs logit_bias or allowed_token_ids",
        "use_transformers_paged": "use rollout={'engine': 'vllm'}",
        "use_transformers_continuous_batching": "use rollout={'engine': 'vllm'}",
        "transformers_continuous_batching_config": "use rollout={'engine': 'vllm'}",
        "cache_implementation": "leave it out, or use rollout={'engine': 'vllm'}",
        "ds3_gather_for_generation": "leave it out: rollout workers hold whole weights",
        "log_completions": "leave it out: completions are always written to the run folder",
        "num_completions_to_print": "read them in completions/ of the run folder; the end of a run shows some",
    }

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    num_generations: int = Field(default=1, ge=1)
    """Completions per prompt."""
    num_generations_eval: int | None = Field(default=None, ge=1)
    """Completions per prompt in evaluation. None: 1 (TRL: `num_generations`)."""
    max_completion_length: int = Field(default=512, ge=1)
    """Longest completion, in tokens; longer ones are truncated."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens. None: what the model's context leaves besides the completion."""
    overlong_prompts: Literal["drop", "refuse"] = "drop"
    """Ours: `drop` longer prompts and report how many, or `refuse` them with an error that names the rows."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens whose probabilities add up to this. 1: from all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the most likely tokens. 0: from all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Sample from tokens that are at least this fraction as likely as the most likely one. None: from all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divide the positive logits, and multiply the negative ones, of tokens that the text already has. 1: no
    penalty."""
    generation_kwargs: GenerationKwargs = Field(default_factory=GenerationKwargs)
    """More of vLLM's sampling parameters, such as `stop`; both engines apply them."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, for example `{enable_thinking: false}`."""
    reward_weights: list[float] | None = None
    """One weight per reward function. None: 1 each."""

    vllm_importance_sampling_correction: bool = True
    """Correct for the gap between the sampler's and the trainer's logprobs (TIS). With top_p, top_k or min_p, both are
    those of the truncated distribution. Penalties and other settings that the trainer cannot reproduce turn the
    correction off."""
    vllm_importance_sampling_mode: CorrectionMode = "sequence_mask"
    """Truncate or mask the correction, per token or per sequence. With `rollout.max_staleness` the default is
    `token_truncate`, because over a whole sequence the drift of a few updates would mask too much."""
    vllm_importance_sampling_clip_max: float | None = Field(default=3.0, gt=0)
    """Largest importance weight; larger ones are truncated or masked. None: no limit."""
    vllm_importance_sampling_clip_min: float | None = Field(default=None, gt=0)
    """Smallest importance weight; smaller ones are raised to it or masked. None: no limit."""

    train_on_arrival: bool | None = None
    """Ours: score, pack and train on groups while others are still being sampled. Gradients add up to the same update except
    for rounding. Groups are taken in the order of the prompts, or as they come if several workers sample without
    `rollout.deterministic` and without `full_determinism`. None: where that is possible, and workers and trainer do not
    share processors."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """The engines that sample completions."""
    scoring: ScoringConfig = Field(default_factory=ScoringConfig, json_schema_extra=NO_EFFECT)
    """The worker processes that call the rewards."""

    @model_validator(mode="before")
    @classmethod
    def _accept_trl_names(cls, values: Any) -> Any:
        """Move TRL's flat vLLM arguments into the rollout section."""
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if value not in _AS_ALWAYS.get(key, ())}
        rollout = section_values(values.get("rollout"))
        if rollout is None:
            return values
        for theirs, ours in _ROLLOUT_NAMES.items():
            if theirs in values:
                rollout.setdefault(ours, values.pop(theirs))
        if "use_vllm" in values:
            rollout.setdefault("engine", "vllm" if values.pop("use_vllm") else "transformers")
        if "vllm_importance_sampling_cap" in values:
            cap = values.pop("vllm_importance_sampling_cap")
            if values.setdefault("vllm_importance_sampling_clip_max", cap) != cap:
                raise ValueError(
                    f"vllm_importance_sampling_cap={cap!r} is TRL's old name for vllm_importance_sampling_clip_max, which "
                    f"is {values['vllm_importance_sampling_clip_max']!r}: leave it out"
                )
        if values.get("top_k", 0) in (-1, None):
            values["top_k"] = 0  # as vLLM and transformers say that there is no limit
        if rollout:
            values["rollout"] = rollout
        return read_generation_kwargs(values)

    def for_ranks(self, data_size: int) -> Self:
        config = super().for_ranks(data_size)
        config.check_batch(data_size)
        return config

    @model_validator(mode="after")
    def _coherent_sampling(self) -> "OnlineConfig":
        if self.generation_kwargs.min_tokens > self.max_completion_length:
            raise ValueError(
                f"generation_kwargs.min_tokens={self.generation_kwargs.min_tokens} must not be above "
                f"max_completion_length={self.max_completion_length}"
            )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low:g} must be below vllm_importance_sampling_clip_max={high:g}"
            )
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
        if self.uncomparable:
            raise ValueError(
                f"rollout.max_staleness={lag} trains on groups of older weights, which importance weights must correct "
                f"for, and {self.uncomparable}: leave that out, or set max_staleness to 0"
            )
        if self.rollout.engine == "transformers":
            raise ValueError(
                f"rollout.max_staleness={lag} lets workers sample while the policy trains, but the transformers engine "
                "samples in the trainer's own process: set it to 0, or the engine to vllm"
            )
        if self.rollout.in_flight_updates and self.full_determinism:
            raise ValueError(
                "rollout.in_flight_updates=true lets timing decide which weights sample a token, so runs do not repeat, as "
                "full_determinism=true asks: leave one of them out"
            )
        if "vllm_importance_sampling_mode" not in self.model_fields_set:
            self.vllm_importance_sampling_mode = "token_truncate"
        return self

    @model_validator(mode="after")
    def _arrival_is_possible(self) -> "OnlineConfig":
        if self.train_on_arrival and (obstacle := self.arrival_obstacle):
            raise ValueError(f"train_on_arrival=true is impossible, because {obstacle}: leave it out")
        return self

    @property
    def arrival_obstacle(self) -> str | None:
        """Return why gradients cannot be gathered before the last group has arrived; None if they can."""
        name = self.normalizer
        if name in COUNTED_BY:
            return None
        return f"what the normalizer {name!r} divides by is not known to be one count of the whole update"

    @property
    def normalizer(self) -> str:
        """Return the name of what the sum over tokens is divided by."""
        return "token_mean"

    @property
    def truncation(self) -> Truncation | None:
        """Return how the sampler truncates the policy's distribution; None if it does not."""
        return Truncation(self.top_p, self.top_k, self.min_p or 0.0) or None

    @property
    def uncomparable(self) -> str | None:
        """Return why the sampler's logprobs cannot be compared with the trainer's; None if they can."""
        drawn = self.generation_kwargs
        names = ["repetition_penalty"] if self.repetition_penalty != 1 else []
        names += [f"generation_kwargs.{name}" for name in _UNCOMPARABLE if getattr(drawn, name)]
        if not names:
            return None
        verb = "shapes" if len(names) == 1 else "shape"
        return f"{' and '.join(names)} {verb} the sampler's distribution, which the trainer does not compute again"

    @property
    def correction_note(self) -> str | None:
        """Return a note if a correction was asked for and is off, otherwise None."""
        if not self.uncomparable or not self.vllm_importance_sampling_correction:
            return None
        return f"no importance correction, and sampling/logp_gap is not measured: {self.uncomparable}"

    def completions_per_update(self, num_ranks: int) -> int:
        """Return how many completions one optimizer update trains on."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_ranks

    def completions_per_rollout(self, num_ranks: int) -> int:
        """Return how many completions are sampled at a time, for one or more updates."""
        return self.completions_per_update(num_ranks)

    def check_batch(self, num_ranks: int) -> None:
        """Raise ConfigError if the completions of a rollout do not make whole groups."""
        batch = self.completions_per_rollout(num_ranks)
        if batch % self.num_generations:
            raise ConfigError(
                f"{batch} completions per rollout ({self._rollout_terms(num_ranks)}) do not divide into groups of "
                f"num_generations={self.num_generations}; "
                f"nearest: {max(1, round(batch / self.num_generations)) * self.num_generations}"
            )

    def _rollout_terms(self, num_ranks: int) -> str:
        """Return, in words, the product that gives the completions of a rollout."""
        return "per_device_train_batch_size x gradient_accumulation_steps" + (
            f" x {num_ranks} ranks" if num_ranks > 1 else ""
        )

    @property
    def passes_per_rollout(self) -> int:
        """Return how often each completion of a rollout is trained on."""
        return 1

    @property
    def total_completions(self) -> int | None:
        """Return the completions of the whole run if it is limited by them, otherwise None."""
        return None
