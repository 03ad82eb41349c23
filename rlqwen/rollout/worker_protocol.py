"""Define the messages between the pool and its workers."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.rollout.engine_placement import SHARED, Placement
from rlqwen.types import FinishReason, Sampling

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from rlqwen.config import RolloutConfig

Sampled = tuple[list[int], list[float], FinishReason, "np.ndarray | None"]
"""Token ids, their logprobs, why the completion ended, and the experts of prompt and completion, if asked for."""


def transfer_of(config: "RolloutConfig") -> str:
    """Return how workers get whole weights, where that is resolved, else the way that always works."""
    return "object_store" if config.weight_transfer == "auto" else config.weight_transfer


WeightVersions = list[tuple[int, int]]
"""(version, tokens that it sampled), in order; see Completion.weight_versions."""
Drawn = tuple[list[Sampled], int, "np.ndarray | None", list[WeightVersions] | None]
"""A worker's answer: a group's completions, the oldest version of the weights that sampled them, the prompt's experts, if
asked for, and the versions of each completion, if weights may change in flight."""


@dataclass(frozen=True)
class EngineSettings:
    """All that a worker needs to start its engine; plain values, because Ray pickles them."""

    engine: str
    """The engine's name, `package.module:Class` or `/path/to/file.py:Class`."""
    model_path: str
    dtype: str
    max_model_length: int
    max_num_seqs: int
    seed: int
    tensor_parallel_size: int
    gpu_memory_utilization: float | None
    """None: what is free when the engine starts, without `reserved_bytes`."""
    enforce_eager: bool | None
    kv_cache_gib: int
    num_threads: int
    """OpenMP threads on CPU."""
    lora_rank: int | None = None
    """Largest rank of the adapters that are loaded as weights; None: whole weights are."""
    weight_transfer: str = "object_store"
    """How whole weights come: `object_store`, `ipc` or `nccl`."""
    sleep_level: int = 0
    """vLLM's level of sleep while the policy trains; 0: never."""
    reserved_bytes: int = 0
    """GPU memory that the trainer will take besides what it holds when the engine starts."""
    tokenizer_files: dict[str, bytes] | None = None
    """Name -> content of the tokenizer's files, for requests that name texts; None: requests are of token ids alone."""
    returns_experts: bool = False
    """Whether completions come with the experts that a mixture chose."""
    updates_in_flight: bool = False
    """Whether weights are replaced while completions are being sampled, which then go on with the new ones."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """`rollout.engine_args`."""

    @classmethod
    def of(cls, placement: Placement, **rest: Any) -> "EngineSettings":
        """Return the settings that a resolved config gives, with `rest`."""
        config = placement.config
        measures_memory = config.gpu_memory_utilization is None and placement.sleep_level
        return cls(
            max_num_seqs=config.max_num_seqs,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=None if measures_memory else config.gpu_memory_utilization or SHARED,
            enforce_eager=config.enforce_eager,
            kv_cache_gib=config.kv_cache_gib,
            weight_transfer=transfer_of(config),
            sleep_level=placement.sleep_level,
            returns_experts=config.routing_replay,
            updates_in_flight=config.in_flight_updates,
            arguments=config.engine_args,
            **rest,
        )


@dataclass(frozen=True)
class Share:
    """Groups that a worker begins together, from an empty engine, so that its steps depend on them alone."""

    number: int
    size: int
    """Groups."""


@dataclass(frozen=True)
class GroupJob:
    """A group as a worker sees it: no prompt text, no columns."""

    token_ids: list[int]
    seeds: tuple[int, ...]
    sampling: Sampling
    """Includes every stop token, also the tokenizer's own."""
    share: Share | None = None
    """None: begin as soon as it arrives."""
    place: int = 0
    """Place in the share."""


def files_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bytes]:
    """Return name -> content of a tokenizer's files, because workers may be on machines that lack its folder."""
    with tempfile.TemporaryDirectory(prefix="rlqwen-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
