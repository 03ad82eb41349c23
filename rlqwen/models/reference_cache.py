"""Keep log-probabilities of a frozen reference on disk, so that they are computed once.

An entry is a safetensors file and a JSON manifest, named by the digest of everything that the values depend on: the
reference's weights and config, the tokenized answers, and the dtype. Other weights or data give another name, so a
stale entry is never found; an entry that is damaged or has another key is reported and not used.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedConfig

from rlqwen.distributed.shards import is_shard, whole
from rlqwen.packing.batch import Tree

CACHE_VARIABLE = "RLQWEN_CACHE"
"""Environment variable that moves the cache from `~/.cache/rlqwen`."""

_FORMAT = 1
_INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Entries of a model's config that do not change what it computes."""


@dataclass(frozen=True)
class ReferenceKey:
    """Hold everything that log-probabilities of a reference depend on; long parts as digests."""

    weights: str
    config: str
    answers: str
    dtype: str
    """Dtype of the forward."""
    ld_alpha: float | None
    """Weight of an answer's surplus tokens in its sum."""

    @property
    def name(self) -> str:
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_logprobs(key: ReferenceKey) -> tuple[Tensor | None, str]:
    """Return the (A,) values under `key`, or None, and a note for the user on where they are, or why there are none."""
    data_file, manifest_file = _files(key)
    if not data_file.exists() and not manifest_file.exists():
        return None, f"none kept for these weights, data and dtype in {data_file.parent}"
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        data = data_file.read_bytes()
    except (OSError, ValueError) as error:
        return None, f"{data_file} cannot be read ({type(error).__name__}) and is not used"
    if not isinstance(manifest, dict) or manifest.get("key") != asdict(key) or manifest.get("format") != _FORMAT:
        return None, f"{manifest_file} says that it belongs to other weights, data or dtype, and is not used"
    if manifest.get("sha256") != hashlib.sha256(data).hexdigest():
        return None, f"{data_file} has changed since it was written, and is not used"
    return load(data)["logprobs"], f"read from {data_file}"


def write_logprobs(key: ReferenceKey, logp_A: Tensor) -> str:
    """Write values under `key`, and return a note for the user; a folder that cannot be written to is not an error."""
    data_file, manifest_file = _files(key)
    data = save({"logprobs": logp_A})
    manifest = {"format": _FORMAT, "key": asdict(key), "count": len(logp_A), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        data_file.parent.mkdir(parents=True, exist_ok=True)
        _replace(data_file, data)
        _replace(manifest_file, (json.dumps(manifest, indent=2) + "\n").encode())
    except OSError as error:
        return f"not kept: {data_file.parent} cannot be written to ({error.strerror}); set {CACHE_VARIABLE}"
    return f"kept in {data_file}"


def digest_weights(weights: Mapping[str, Any]) -> str:
    """Return a digest of names, dtypes, shapes and bytes; quantized layers also have values that are not tensors."""
    names = sorted(weights)
    # Sharded weights are gathered one at a time, by all ranks together.
    digests = {name: _digest_weight(name, whole(weights[name])) for name in names if is_shard(weights[name])}
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing lets other threads run
        digest: Callable[[str], bytes] = lambda name: digests.get(name) or _digest_weight(name, weights[name])
        return hashlib.blake2b(b"".join(pool.map(digest, names)), digest_size=16).hexdigest()


def _digest_weight(name: str, value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return hashlib.blake2b(f"{name} {value!r}".encode()).digest()
    digest = hashlib.blake2b(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def digest_config(config: PreTrainedConfig) -> str:
    """Return a digest of the entries that change the computation, without names, paths and versions."""
    values = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def digest_trees(trees: Iterable[Tree]) -> str:
    """Return a digest of token ids and loss masks, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for tree in trees:
        branches = [(branch.token_ids, branch.loss_mask) for branch in tree.branches]
        digest.update(json.dumps([tree.prefix, branches]).encode())
    return digest.hexdigest()


def _files(key: ReferenceKey) -> tuple[Path, Path]:
    root = os.environ.get(CACHE_VARIABLE)
    folder = (Path(root).expanduser() if root else Path.home() / ".cache" / "rlqwen") / "reference"
    return folder / f"{key.name}.safetensors", folder / f"{key.name}.json"


def _replace(path: Path, data: bytes) -> None:
    """Write a file completely or not at all; two runs may write the same file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)
