"""Configure how completions are generated and scored."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlqwen.config.base import NO_EFFECT, Config, PathText, Section
from rlqwen.errors import ConfigError
from rlqwen.plugins.kinds import ENGINES


class RolloutConfig(Section):
    """Configure the engines that sample completions."""

    engine: str | None = None
    """`vllm`: engines in Ray workers. `transformers`: plain sampling in the trainer's process, which is slow. Or another
    registered engine (`rlqwen engines`), `package.module:Class` or `file.py:Class`. None: vLLM if it can be imported,
    otherwise transformers with a warning."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of an engine that a plugin brings."""
    placement: Literal["colocate", "separate"] = "colocate"
    """`colocate`: engines on the trainer's GPUs; they sleep while the policy trains, unless `max_staleness` has both work at
    the same time. `separate`: ranks train on the machine's first GPUs, as many as `rlqwen run --nproc-per-node` starts, and
    engines have the others. Without GPUs there is nothing to place."""
    sleep: bool = True
    """Whether engines that take turns with the trainer on its GPUs free their memory while the policy trains. False: they
    keep it, so both must fit at the same time; see `gpu_memory_utilization`."""
    num_workers: int | None = Field(default=None, ge=1)
    """Number of vLLM engines, one Ray actor each. None: what fills the trainer's GPUs, or with `placement: separate` the
    others; 1 on a CPU and on a cluster (`ray_address`)."""
    num_cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs requested from Ray per worker. None: 1 on a GPU machine, otherwise an equal share of this machine's."""
    num_gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs requested from Ray per worker. None: `tensor_parallel_size` if there are GPUs, otherwise 0."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that one engine shards the model over."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU's memory that one engine may use. None: 0.9 on GPUs of its own; what the trainer leaves free, at most
    0.9, if it sleeps while the policy trains; otherwise 0.4."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """KV cache of one engine on CPU, in GiB."""
    max_model_length: int | None = Field(default=None, gt=0)
    """Context of the engines, in tokens. None: the model's own, at most prompt plus completion of this run."""
    max_num_seqs: int = Field(default=128, ge=1)
    """Completions that one engine decodes at the same time."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype in which engines compute. `auto`: that of the trainer's forward pass."""
    enforce_eager: bool | None = None
    """Skip compilation and CUDA graphs. None: only on CPU."""
    lora: bool | None = None
    """True: send the workers only the policy's adapter, which they apply to the base model that they started with; vLLM
    supports that for LoRA and rsLoRA on the projections of dense models. False: send weights with the adapter merged.
    None: the adapter if vLLM supports it and there is a GPU, because on CPU an unmerged adapter makes sampling about
    three times slower."""
    weight_transfer: Literal["auto", "ipc", "nccl", "object_store"] = Field(default="auto", json_schema_extra=NO_EFFECT)
    """How workers get whole weights. `ipc`: from the memory of the GPU that a worker shares with a rank. `nccl`: by a
    broadcast to workers on other GPUs (`placement: separate`). `object_store`: through Ray's object store and the CPU; only
    there is a copy, of which a worker's engine can be built again and which a replaced worker can be sent at any time.
    `auto`: the first of these that is possible, and `ipc` with one rank only."""
    start_timeout: float = Field(default=300.0, gt=0, json_schema_extra=NO_EFFECT)
    """Seconds for Ray and all engines to start."""
    generate_timeout: float = Field(default=600.0, gt=0, json_schema_extra=NO_EFFECT)
    """Seconds in which a worker must finish a group. After that it counts as dead and is replaced, and its groups are
    retried."""
    sync_timeout: float = Field(default=300.0, gt=0, json_schema_extra=NO_EFFECT)
    """Seconds for all workers to acknowledge new weights."""
    deterministic: bool = False
    """True: give several workers fixed shares of the groups, each started together, so that the same weights and seeds
    give bit-identical completions and logprobs, which exact resume needs. False: a group goes to the next free worker,
    and what else an engine computes at that time may change a logprob's last bits. A single worker always gets all
    groups at once. Groups that are sampled again after a worker's death are equal except for rounding."""
    max_restarts: int = Field(default=3, ge=0, json_schema_extra=NO_EFFECT)
    """How often workers may be replaced during the run, all workers together, before the run stops."""
    max_staleness: int = Field(default=0, ge=0)
    """0: each step trains on groups of the current weights. k: on groups of the weights of k steps ago, so that workers
    sample groups for later steps while the policy trains; importance weights correct for the difference. More than 1
    gives slow rewards more time."""
    in_flight_updates: bool = False
    """For `max_staleness` of at least 1. True: send workers the new weights as soon as a step has made them, while groups are
    being sampled. Workers pause for that between two tokens, keep their unfinished completions with the keys and values
    computed so far, and go on with the new weights; so one completion may come from several versions. Each token's logprob
    is of the weights that sampled it, and the metrics `tokens/lag_...` count tokens by age. Which weights sample a token
    then depends on timing, so a resumed run does not repeat to the bit. False: a batch is sampled to its end first."""
    routing_replay: bool = False
    """For mixtures of experts: make the trainer's forward pass choose the experts that vLLM chose for each token, with
    the weights of its own routers (R3, arXiv 2510.11370). That narrows gaps between sampler and trainer where rounding
    alone would send tokens to other experts. It applies to policy and reference; a critic keeps its own routing."""
    ray_address: str | None = Field(default=None, json_schema_extra=NO_EFFECT)
    """Address of a running Ray cluster. None: start a private cluster on this machine, which ends with the run."""

    canary_tolerance: float | None = Field(default=None, gt=0, json_schema_extra=NO_EFFECT)
    """Largest allowed mean gap between logprobs per token after a weight sync, in nats. None: twice the gap of the run's
    first sync, when workers and trainer hold the same weights; at least 1e-4 in float32 and 0.02 in bfloat16 and float16.
    The first sync may have 1e-3 and 0.1, because rounding alone moves an unlikely token by that much, but not the mean."""

    @property
    def worker_count(self) -> int:
        """Return the number of workers; 1 where it is not resolved yet."""
        return self.num_workers or 1

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

    @model_validator(mode="after")
    def _weights_can_change_in_flight(self) -> "RolloutConfig":
        if not self.in_flight_updates:
            return self
        obstacles = {
            "max_staleness": not self.max_staleness
            and "no group is sampled while the policy trains: set it to 1 or more",
            "deterministic": self.deterministic
            and "timing decides which weights sample a token: leave one of them out",
            "routing_replay": self.routing_replay
            and "experts are recorded for one version only: leave one of them out",
        }
        for key, why in obstacles.items():
            if why:
                raise ValueError(f"in_flight_updates=true and {key}={getattr(self, key)}: {why}")
        return self

    @staticmethod
    def check_experts(model: str, num_experts: int) -> None:
        """Raise ConfigError if routing is to be replayed in a model without experts."""
        if not num_experts:
            raise ConfigError(f"rollout.routing_replay is for mixtures of experts, and {model} is none: leave it out")


class RewardSpec(Config):
    """One reward of a run."""

    name: PathText
    """A registered name, `package.module:function`, or `path/to/file.py:function`."""
    weight: float = 1.0
    """Weight of this reward in the sum."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments that are bound to the function by keyword, or passed to its factory."""


def _accept_bare_names(rewards: Any) -> Any:
    if isinstance(rewards, list):
        return [{"name": reward} if isinstance(reward, str) else reward for reward in rewards]
    return rewards


RewardSpecs = Annotated[list[RewardSpec], BeforeValidator(_accept_bare_names)]
"""Rewards, each a mapping or a bare name."""


class ScoringConfig(Section):
    """Configure the worker processes that call the rewards."""

    num_workers: int = Field(default=1, ge=1)
    """Processes that score; each loads every reward."""
    timeout: float = Field(default=30.0, gt=0)
    """Seconds that a sample on which a reward hangs may cost. A call on a group of n samples may take n/(n+1) of it; then
    the worker is killed and replaced, and the reward is called on each sample alone."""
    start_timeout: float = Field(default=120.0, gt=0)
    """Seconds for a worker to import the rewards."""
    memory_gib: float | None = Field(default=4.0, gt=0)
    """Memory limit of a worker, in GiB; a reward that allocates more gets MemoryError. None: no limit."""
    cpu_seconds: float | None = Field(default=None, gt=0)
    """Processor seconds that one call may use, all its threads together. After that the worker is killed and replaced.
    None: what fits into `timeout`."""
    env: list[str] = Field(default_factory=list)
    """Environment variables to pass to rewards although their names look like secrets, such as `OPENAI_API_KEY` for a
    judge. Isolated rewards get none."""
    isolated: list[str] = Field(default_factory=list)
    """Names of rewards to call in isolated workers, besides rewards that ask for it themselves. An isolated worker has
    no network and no environment, writes no files, and reads only Python's own. SECURITY.md states the limits."""
    isolation: Literal["required", "off"] = "required"
    """`required`: refuse rewards that ask for isolation if this machine cannot isolate. `off`: then call them in
    ordinary workers."""
    max_failure_share: float = Field(default=0.5, ge=0, le=1)
    """Stop the run if a reward fails on more than this share of a batch."""
    max_wait_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a step that may be spent waiting for a reward whose calls run into `timeout`. Above it, a warning names
    the reward. 1: no limit."""
    max_wait_seconds: float = Field(default=600.0, gt=0)
    """Stop the run if consecutive steps above `max_wait_share` have waited this many seconds for such a reward."""
    in_process: list[str] = Field(default_factory=list)
    """Names of rewards to call in the trainer's own process, without a timeout: for rewards that keep state."""
