"""What travels between the pool and its workers."""

from dataclasses import dataclass

from rlqwen.types import FinishReason, Sampling

Sampled = tuple[list[int], list[float], FinishReason]
"""Token ids, their logprobs, and why the completion ended."""


@dataclass(frozen=True)
class EngineSettings:
    """All that a worker needs to start its engine; plain values, for they travel through Ray."""

    model_path: str
    dtype: str
    max_model_length: int
    max_num_seqs: int
    seed: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    enforce_eager: bool | None
    kv_cache_gib: int
    num_threads: int
    """OpenMP threads on CPU."""
    lora_rank: int | None = None
    """Largest rank of the adapters that are loaded as weights; None: whole weights are."""


@dataclass(frozen=True)
class Share:
    """Groups that a worker begins together, from an empty engine, so that its steps depend on nothing but them."""

    number: int
    size: int
    """Groups."""


@dataclass(frozen=True)
class GroupJob:
    """A group as a worker sees it: no prompt text, no columns."""

    token_ids: list[int]
    seeds: tuple[int, ...]
    sampling: Sampling
    """With every stop token, the tokenizer's own included."""
    share: Share | None = None
    """None: begun as soon as it comes."""
    place: int = 0
    """In the share."""
