"""Define what a rollout engine is, and start the one that a config names.

An engine is a subclass of `Engine` that is registered under the entry point group `rlqwen.engines`, or named as
`package.module:Class` or `path/to/file.py:Class` in `rollout.engine`. It runs in one of two places:

- in Ray workers (`in_workers = True`): it supplies `start`, which returns a `WorkerEngine`; the pool does the rest.
- in the trainer's own process: it supplies `build`, which returns a `RolloutEngine`.

Before anything is started, its other methods say what it can do; whatever it cannot do is refused by name.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rlqwen.config import RolloutConfig
from rlqwen.config.usable_values import real_path
from rlqwen.errors import ConfigError, ResourceError
from rlqwen.models.hub import read_config
from rlqwen.plugins.kinds import ENGINES
from rlqwen.rollout.engine_placement import Placement, count_workers, this_machine
from rlqwen.rollout.worker_protocol import EngineSettings, Sampled, WeightVersions
from rlqwen.terminal import warn
from rlqwen.types import Canary, Group, GroupRequest, Sampling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rlqwen.rollout.weight_sync import LoadReport, WeightBundle

DEFAULT_ENGINES = ("vllm", "transformers")
"""Names that are tried in order if a config names no engine."""


class RolloutEngine(Protocol):
    """Sample groups of completions from versioned weights."""

    version: int
    """Version of the weights that the next group is sampled from; 0 is what the engine started with."""

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        """Yield one group per request, exactly once, in order of completion; `group.prompt` is the request's own.

        A new call drops what is left of the previous one.
        """
        ...

    def load_weights(
        self, version: int, weights: "Iterable[tuple[str, torch.Tensor]]", canary: Canary | None
    ) -> dict[str, float]:
        """Sample from `weights` from now on; return `sync/...` metrics. Groups still in flight are dropped.

        `weights`: every weight under its name in the checkpoint; in an engine built with `lora_rank`, those of the
        adapter under PEFT's names, its scaling folded in. WeightSyncError if they are not those of the model, or if a
        worker's logprobs of the canary differ by more than its tolerance.
        """
        ...

    def cancel(self) -> None:
        """Make a `generate` that runs in another thread raise RolloutError soon."""
        ...

    def close(self) -> None:
        """End the workers; may be called twice."""
        ...


class WorkerEngine(Protocol):
    """Run in a Ray worker, where one thread calls it."""

    def add(self, request_id: str, token_ids: list[int], seed: int, sampling: Sampling) -> None:
        """Begin one completion of a prompt."""
        ...

    def step(self) -> Iterable[tuple[str, Sampled]]:
        """Advance all completions in flight, and return those that are complete with their request ids."""
        ...

    def abort(self, request_ids: list[str]) -> None:
        """Drop completions in flight."""
        ...

    def forget_prompts(self) -> None:
        """Drop caches of earlier prompts, so that what follows depends on itself alone."""
        ...

    def load(self, bundle: "WeightBundle") -> "LoadReport":
        """Replace the weights; report how long it took and how far the canary's logprobs are off."""
        ...


class GpuWorkerEngine(WorkerEngine, Protocol):
    """Take turns with the trainer on a GPU; an engine that `sleeps` or has more `weight_transfers` than the store."""

    def sleep(self) -> None:
        """Free the GPU's memory until weights are loaded."""
        ...

    def transfer(self, phase: str, **arguments: Any) -> None:
        """Run a phase of vLLM's weight-transfer protocol; `load` of a bundle that is not stored follows the last."""
        ...


class InFlightWorkerEngine(WorkerEngine, Protocol):
    """Take new weights while completions are in flight; an engine with `updates_in_flight`."""

    def hold(self) -> None:
        """Stop between two tokens, and keep everything in flight until `load` has replaced the weights."""
        ...

    def take_versions(self, request_id: str) -> WeightVersions:
        """Return the versions that sampled a completion that `step` has returned, and forget it."""
        ...


class Engine:
    """One kind of rollout engine."""

    title: ClassVar[str] = ""
    """What messages call it, such as `vLLM`."""
    in_workers: ClassVar[bool] = False
    """Whether it runs in Ray workers, sampling while the policy trains if `rollout.max_staleness` asks for it."""
    loads_adapters: ClassVar[bool] = False
    """Whether it can be sent a LoRA adapter alone."""
    returns_experts: ClassVar[bool] = False
    """Whether it reports the experts that a mixture chose, for `rollout.routing_replay`."""
    weight_transfers: ClassVar[tuple[str, ...]] = ("object_store",)
    """Values of `rollout.weight_transfer` that it takes."""
    sleeps: ClassVar[bool] = False
    """Whether it can free its GPU's memory while the policy trains."""
    updates_in_flight: ClassVar[bool] = False
    """Whether it can replace weights and keep completions in flight, for `rollout.in_flight_updates`."""
    takes_arguments: ClassVar[bool] = False
    """Whether it reads `rollout.engine_args`."""

    @classmethod
    def why_unavailable(cls) -> str | None:
        """Return why it cannot run on this machine, and how to mend that; None if it can."""
        return None

    @classmethod
    def choose_dtype(cls, config: RolloutConfig, model_path: str, compute_dtype: str) -> tuple[str, str | None]:
        """Return the dtype that it computes in, and a note for the user if it is not the trainer's, `compute_dtype`.

        Raises ConfigError if it cannot compute the model in the dtype that is asked for.
        """
        return compute_dtype if config.dtype == "auto" else config.dtype, None

    @classmethod
    def keeps_ties(cls, device_type: str) -> bool:
        """Return whether its top-k and top-p keep all tokens that tie at the edge, on a device such as `cpu`."""
        return False

    @classmethod
    def set_environment(cls, settings: EngineSettings) -> None:
        """Set what its libraries read from the environment at import; called in a worker before `start`."""

    @classmethod
    def start(cls, settings: EngineSettings) -> WorkerEngine:
        """Return the engine of this worker, with the weights of `settings.model_path`."""
        raise ConfigError(f"the rollout engine {cls.__name__} has in_workers = True and no method start")

    @classmethod
    def build(
        cls, config: RolloutConfig, *, policy: Any, tokenizer: "PreTrainedTokenizerBase", max_model_length: int
    ) -> RolloutEngine:
        """Return the engine of this process; `policy.generation_model()` gives the model in eval mode."""
        raise ConfigError(f"the rollout engine {cls.__name__} has in_workers = False and no method build")


def engine_class(config: RolloutConfig) -> type[Engine]:
    """Return the engine that `config` names, or the first default one that can run here.

    Raises ConfigError if what is named is no engine or cannot do what the config asks for.
    """
    for name in DEFAULT_ENGINES if config.engine is None else ():
        engine = ENGINES.load(name)
        if engine.why_unavailable() is None:
            return engine  # type: ignore[no-any-return]
    found = ENGINES.locate(config.engine or DEFAULT_ENGINES[-1])
    engine = found.value
    if not (isinstance(engine, type) and issubclass(engine, Engine)):
        raise ConfigError(
            f"rollout.engine {config.engine!r} ({found.origin}) is no subclass of rlqwen.rollout.engine.Engine: {engine!r}"
        )
    if config.engine_args and not engine.takes_arguments:
        raise ConfigError(f"rollout.engine_args: the engine {config.engine!r} takes no arguments")
    if config.in_flight_updates and not engine.updates_in_flight:
        raise ConfigError(
            f"rollout.in_flight_updates=true: the engine {config.engine!r} cannot replace weights and keep what it samples; "
            "leave it out, or use vllm"
        )
    return engine


def build_engine(
    config: RolloutConfig,
    *,
    model_path: str,
    tokenizer: "PreTrainedTokenizerBase",
    policy: Any = None,
    compute_dtype: str,
    max_model_length: int,
    seed: int,
    lora_rank: int | None = None,
    reads_text: bool = False,
    placement: Placement | None = None,
    reserved_bytes: int = 0,
) -> RolloutEngine:
    """Build the engine that `config` names. Workers start in the background; their first use waits for them.

    Args:
        model_path: folder with config and weights to start from.
        policy: the policy to sample from, for an engine in this process.
        compute_dtype: `float32`, `bfloat16` or `float16`; `config.dtype` takes precedence.
        max_model_length: tokens of prompt and completion; the model's own context caps it.
        lora_rank: workers are sent adapters of up to this rank, and keep the weights of `model_path` under them.
        placement: where workers run; None: on all GPUs of this machine, where nothing trains.
        reserved_bytes: GPU memory that the trainer will take besides what it holds now.
        reads_text: requests will have stop texts or bad words (`Sampling.reads_text`), for which workers need the tokenizer.

    Raises ResourceError if the engine cannot run here.
    """
    engine = engine_class(config)
    if (why := engine.why_unavailable()) is not None:
        raise ResourceError(why)
    if config.engine is None and not engine.in_workers:
        missing = ENGINES.load(DEFAULT_ENGINES[0]).why_unavailable()
        warn(f"sampling by {engine.title} in the trainer's own process, which is slow: {missing}", stacklevel=2)
    dtype, note = engine.choose_dtype(config, model_path, compute_dtype)
    if note is not None:
        warn(note, stacklevel=2)
    length = min(max_model_length, _context_length(model_path) or max_model_length)
    if not engine.in_workers:
        if policy is None:
            raise ConfigError(f"the engine {engine.title} samples from the policy: give build_engine a policy")
        return engine.build(config, policy=policy, tokenizer=tokenizer, max_model_length=length)
    from rlqwen.rollout.pool import RolloutPool

    return RolloutPool(
        placement or _without_trainer(config),
        engine=engine_spec(config),
        model_path=model_path,
        tokenizer=tokenizer,
        dtype=dtype,
        max_model_length=length,
        seed=seed,
        lora_rank=lora_rank,
        reads_text=reads_text,
        reserved_bytes=reserved_bytes,
    )


def _without_trainer(config: RolloutConfig) -> Placement:
    return Placement(config.model_copy(update={"num_workers": count_workers(config, this_machine("cpu"))}))


def engine_spec(config: RolloutConfig) -> str:
    """Return what a worker loads the engine by: the name, module or absolute file."""
    spec = config.engine or DEFAULT_ENGINES[0]
    home, colon, attribute = spec.rpartition(":")
    return f"{real_path(home)}:{attribute}" if colon and home.endswith(".py") else spec


def _context_length(model_path: str) -> int | None:
    """Return the tokens that the model's positions reach, from its config; None if that does not say."""
    config = read_config(model_path)
    length: int | None = (config.get("text_config") or config).get("max_position_embeddings")
    return length
