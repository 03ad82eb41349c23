"""How completions are generated and scored."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlqwen.config.base import NO_EFFECT, Config, Section
from rlqwen.errors import ConfigError
from rlqwen.plugins.kinds import ENGINES


class RolloutConfig(Section):
    """The pool of rollout workers."""

    engine: str | None = None
    """`vllm`: engines in Ray workers. `transformers`: plain sampling in the trainer's process, which is slow. Or another
    registered engine (`rlqwen engines`), `package.module:Class` or `file.py:Class`. None: vLLM if it can be imported,
    otherwise transformers with a warning."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a plugin's engine."""
    num_workers: int = Field(default=1, ge=1)
    """Number of vLLM engines, each an actor."""
    num_cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs asked of Ray for each worker. None: 1 on a GPU machine, else an equal share of this machine's."""
    num_gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs asked of Ray for each worker. None: `tensor_parallel_size` where GPUs exist, else 0."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that one engine shards the model over."""
    gpu_memory_utilization: float = Field(default=0.4, gt=0, le=1)
    """Share of a GPU's memory that one engine may take."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """KV cache of one engine on CPU, in GiB."""
    max_model_length: int | None = Field(default=None, gt=0)
    """Context of the engines, in tokens. None: the model's own, at most prompt plus completion of this run."""
    max_num_seqs: int = Field(default=128, ge=1)
    """Completions that one engine decodes at the same time."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the engines compute in. `auto`: what the trainer's forward computes in."""
    enforce_eager: bool | None = None
    """Skip compilation and CUDA graphs. None: only on CPU."""
    lora: bool | None = None
    """Send the workers only the policy's adapter, which the engines apply to the base that they start with; vLLM can
    for LoRA and rsLoRA on the projections of dense models. False: weights with the adapter merged. None: the adapter
    where vLLM can and there is a GPU; on CPU it samples about three times slower with the adapter apart."""
    start_timeout: float = Field(default=300.0, gt=0, json_schema_extra=NO_EFFECT)
    """Seconds for Ray and all engines to come up."""
    generate_timeout: float = Field(default=600.0, gt=0, json_schema_extra=NO_EFFECT)
    """Seconds in which a worker must finish a group; past it the worker counts as dead, is replaced, and its groups
    are retried."""
    sync_timeout: float = Field(default=300.0, gt=0, json_schema_extra=NO_EFFECT)
    """Seconds for every worker to acknowledge new weights."""
    deterministic: bool = False
    """Deal groups out to several workers in fixed shares, each begun together, so that the same weights and seeds give
    the same completions and logprobs to the bit, which exact resume rests on. False: a group goes to whoever has room,
    and what else an engine computes at that time may change a logprob's last bits. One worker always gets all at once.
    Groups drawn again after a worker's death are the same but for rounding."""
    max_restarts: int = Field(default=3, ge=0, json_schema_extra=NO_EFFECT)
    """How often workers are replaced over the run, all together, before the run stops."""
    max_staleness: int = Field(default=0, ge=0)
    """0: each step trains on groups of the present weights. k: on groups of the weights of k steps ago, so that workers
    sample the coming steps' groups while the policy trains; importance weights correct for the difference. More than 1
    gives slow rewards more time."""
    routing_replay: bool = False
    """For mixtures of experts: have the trainer's forward choose the experts that vLLM chose for each token, with the
    weights that its own routers give them (R3, arXiv 2510.11370). Off-policy gaps shrink where rounding alone would send
    tokens to other experts. Policy and reference alike; a critic keeps its own."""
    ray_address: str | None = Field(default=None, json_schema_extra=NO_EFFECT)
    """Address of a running Ray cluster. None starts a private one on this machine and ends it with the run."""

    canary_tolerance: float | None = Field(default=None, gt=0, json_schema_extra=NO_EFFECT)
    """Mean logprob gap a token allowed after a sync. None: 1e-3 in float32, 0.1 in bfloat16 and float16, whose rounding
    alone moves an unlikely token by more than that, but not the mean."""

    @field_validator("engine")
    @classmethod
    def _engine_is_registered(cls, value: str | None) -> str | None:
        if value is not None:
            ENGINES.check_name(value, "engine")
        return value

    @model_validator(mode="after")
    def _experts_come_from_vllm(self) -> "RolloutConfig":
        if self.routing_replay and self.engine == "transformers":
            raise ValueError(
                "routing_replay=true replays experts that vLLM chose, and engine is 'transformers', which samples with the "
                "trainer's own routers: leave one of them out"
            )
        return self

    @staticmethod
    def check_experts(model: str, num_experts: int) -> None:
        """ConfigError where routing is to be replayed in a model without experts."""
        if not num_experts:
            raise ConfigError(f"rollout.routing_replay is for mixtures of experts, and {model} is none: leave it out")


class RewardSpec(Config):
    """One reward of a run."""

    name: str
    """A registered name, `package.module:function`, or `path/to/file.py:function`."""
    weight: float = 1.0
    args: dict[str, Any] = Field(default_factory=dict)
    """Bound to the function by keyword, or given to its factory."""


def _accept_bare_names(rewards: Any) -> Any:
    if isinstance(rewards, list):
        return [{"name": reward} if isinstance(reward, str) else reward for reward in rewards]
    return rewards


RewardSpecs = Annotated[list[RewardSpec], BeforeValidator(_accept_bare_names)]
"""Rewards, of which one may be its bare name."""


class ScoringConfig(Section):
    """The worker processes that call the rewards."""

    num_workers: int = Field(default=1, ge=1)
    """Processes that score; each holds every reward."""
    timeout: float = Field(default=30.0, gt=0)
    """Seconds for one call of one reward on one group; past it the worker is killed and replaced."""
    start_timeout: float = Field(default=120.0, gt=0)
    """Seconds for a worker to import the rewards."""
    memory_gib: float | None = Field(default=4.0, gt=0)
    """Memory that a worker may take; a reward that asks for more gets MemoryError. None: no limit."""
    cpu_seconds: float | None = Field(default=None, gt=0)
    """Processor time that one call may take, of all its threads together; past it the worker is killed and replaced.
    None: what fits into `timeout`."""
    env: list[str] = Field(default_factory=list)
    """Variables of the environment to pass to rewards although their names look like secrets, such as
    `OPENAI_API_KEY` for a judge. Isolated rewards get none."""
    isolated: list[str] = Field(default_factory=list)
    """Names of rewards to call in isolated workers, beside those that ask for it themselves: no network, no file
    written, no environment, none read but Python's own. SECURITY.md says how far that goes."""
    isolation: Literal["required", "off"] = "required"
    """`off`: where this machine can't isolate, call rewards that ask for it in ordinary workers all the same."""
    max_failure_share: float = Field(default=0.5, ge=0, le=1)
    """Stop the run when a reward fails on more than this share of a batch."""
    max_wait_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a step that may be spent waiting for a reward whose calls run into `timeout`. Above it, a warning names
    the reward. 1: however long."""
    max_wait_seconds: float = Field(default=600.0, gt=0)
    """Stop the run when steps above `max_wait_share`, one after the other, have waited this long for such a reward."""
    in_process: list[str] = Field(default_factory=list)
    """Names of rewards to call in the trainer's own process, without a deadline: for rewards that keep state."""
