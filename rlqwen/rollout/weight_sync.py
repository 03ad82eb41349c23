"""Send versioned weights from the trainer to the workers.

The trainer puts them into Ray's object store once; every worker on a machine maps the same memory. What is sent is
compared with what the checkpoint holds before any worker sees it, because vLLM silently keeps a weight that is not sent.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.errors import WeightSyncError
from rlqwen.models.hub import is_tied, read_config, stored_tensors
from rlqwen.types import Canary

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK_BYTES = 512 * 1024**2
"""Bytes of weights that are copied to the host and pickled at a time."""
Shapes = dict[str, tuple[int, ...]]
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_BIT_VIEWS = {"torch.bfloat16": "int16"}
"""dtype that NumPy lacks -> the dtype of the same width that carries its bits."""


@dataclass(frozen=True)
class WeightBundle:
    """One version of all weights, or of the adapter's weights, in the object store."""

    version: int
    chunks: tuple[Any, ...]
    """Object references; each is a list of (name, array, torch dtype). Empty: the weights went from GPU to GPU."""
    aliases: dict[str, str]
    """Names that share another name's tensor, as a tied head does: alias -> name."""
    canary: Canary | None
    num_bytes: int

    @property
    def is_stored(self) -> bool:
        """Return whether the object store holds the weights, so that a worker can read them again."""
        return bool(self.chunks)

    def accepts(self, gap: float | None) -> bool:
        """Return whether a worker with this canary gap may serve; one with NaN may not."""
        return self.canary is None or gap is None or gap <= self.canary.tolerance

    def buckets(self) -> "Iterator[list[tuple[str, torch.Tensor]]]":
        """Yield the weights in buckets, as read-only views of the object store; blocks, and is called in a worker."""
        import ray
        import torch

        named = {name: alias for alias, name in self.aliases.items()}
        for chunk in self.chunks:
            bucket = []
            for name, array, dtype in ray.get(chunk):
                tensor = torch.from_numpy(array).view(getattr(torch, dtype.removeprefix("torch.")))
                bucket.append((name, tensor))
                if name in named:
                    bucket.append((named[name], tensor))
            yield bucket

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Return all weights by name; see `buckets`."""
        return {name: tensor for bucket in self.buckets() for name, tensor in bucket}


@dataclass(frozen=True)
class LoadReport:
    """A worker's acknowledgement of new weights."""

    version: int
    canary_gap: float | None
    """Mean absolute logprob gap, in nats per token; None without a canary."""
    rebuilt: bool
    """Whether the engine was rebuilt, because the canary failed after loading in place."""
    seconds: float


def describe_reports(reports: Sequence[LoadReport], *, sent_s: float) -> dict[str, float]:
    """Return the metrics of a sync that took `sent_s` seconds before workers loaded the weights."""
    gaps = [report.canary_gap for report in reports if report.canary_gap is not None]
    return {
        **({"sync/canary_gap": max(gaps)} if gaps else {}),
        "sync/seconds": sent_s + max(report.seconds for report in reports),
        "sync/rebuilt_engines": float(sum(report.rebuilt for report in reports)),
    }


def publish(
    version: int,
    weights: "Iterable[tuple[str, torch.Tensor]]",
    canary: Canary | None,
    *,
    dtype: str,
    expected: "ExpectedWeights",
    put: Callable[[Any], Any],
) -> WeightBundle:
    """Put `weights`, cast to `dtype`, into the object store by `put`; raise WeightSyncError if they are not as `expected`.

    A tied head is not sent but named as an alias of the embedding.
    """
    import torch

    target = getattr(torch, dtype)
    chunks: list[Any] = []
    chunk: list[tuple[str, np.ndarray, str]] = []
    shapes: Shapes = {}
    pending_bytes = num_bytes = 0
    for name, tensor in weights:
        shapes[name] = tuple(tensor.shape)
        if name == _HEAD and expected.is_tied:
            continue
        host = _to_host(tensor.detach(), expected.sent_dtype(name, tensor, target))
        bits = _BIT_VIEWS.get(str(host.dtype))
        array = (host.view(getattr(torch, bits)) if bits else host).numpy()
        chunk.append((name, array, str(host.dtype)))
        pending_bytes += array.nbytes
        num_bytes += array.nbytes
        if pending_bytes >= CHUNK_BYTES:
            chunks.append(_put(chunk, put))
            chunk, pending_bytes = [], 0
    if chunk:
        chunks.append(_put(chunk, put))
    return WeightBundle(version, tuple(chunks), expected.check(shapes), canary, num_bytes)


def _to_host(tensor: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Return the tensor in `dtype` on the CPU; from a GPU in pinned memory, and perhaps not there yet, see `_put`.

    Into memory that is not pinned an H200 copies 1.5 GB/s.
    """
    import torch

    cast = tensor.to(dtype).contiguous()
    if not cast.is_cuda:
        return cast.cpu()
    host = torch.empty(cast.shape, dtype=dtype, pin_memory=True)
    return host.copy_(cast, non_blocking=True)


def _put(chunk: list[Any], put: Callable[[Any], Any]) -> Any:
    """Put a chunk whose copies may still be on their way."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return put(chunk)


def sent_bytes(model_path: str, dtype: str, lora_rank: int | None) -> int:
    """Return the size of one version in bytes: all weights of the checkpoint in `dtype`, or at most an adapter of
    `lora_rank` on every projection."""
    import torch

    shapes = _checkpoint_shapes(Path(model_path)).items()
    if lora_rank is None:
        count = sum(math.prod(shape) for _, shape in shapes)
    else:
        adapted = [shape for name, shape in shapes if len(shape) == 2 and not name.endswith((_HEAD, _EMBEDDING))]
        count = lora_rank * sum(sum(shape) for shape in adapted)
    return count * int(getattr(torch, dtype).itemsize)


class ExpectedWeights:
    """Names and shapes that every sync must have: those of the starting checkpoint; for an adapter, of the first sync."""

    def __init__(self, model_path: str | None) -> None:
        self._shapes = {} if model_path is None else _checkpoint_shapes(Path(model_path))
        self.is_tied = model_path is not None and is_tied(read_config(model_path))
        self.float32_names: set[str] = set() if model_path is None else _float32_names(Path(model_path))

    def sent_dtype(self, name: str, tensor: "torch.Tensor", dtype: "torch.dtype") -> "torch.dtype":
        """Return the dtype that a weight is sent in to workers that compute in `dtype`: float32 where the checkpoint holds
        it so beside weights of half precision."""
        import torch

        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if name in self.float32_names else dtype

    def check(self, shapes: Shapes) -> dict[str, str]:
        """Raise WeightSyncError unless `shapes` fits; return the aliases, such as the head of a tied model."""
        expected = self._shapes or shapes
        # A tied head may be in the checkpoint and in the stream, or in neither.
        optional = {_HEAD} if self.is_tied else set()
        missing = sorted(set(expected) - set(shapes) - optional)
        unknown = sorted(set(shapes) - set(expected) - optional)
        misshaped = [
            f"{name} is {list(shapes[name])}, not {list(expected[name])}"
            for name in sorted(set(shapes) & set(expected))
            if shapes[name] != expected[name]
        ]
        faults = [_list("missing", missing), _list("unknown", unknown), _list("of another shape", misshaped)]
        if any(faults):
            raise WeightSyncError(
                "the weights sent to the rollout workers are not those of the model that they started with: "
                + "; ".join(fault for fault in faults if fault)
                + ". Send every weight under its name in the checkpoint"
            )
        self._shapes = expected
        embedding = next((name for name in shapes if name.endswith(_EMBEDDING)), None)
        return {_HEAD: embedding} if self.is_tied and embedding else {}


def explain_gap(worker: str, report: LoadReport, bundle: WeightBundle) -> str:
    """Return the message for a worker whose canary is off."""
    tolerance = bundle.canary.tolerance if bundle.canary else 0.0
    rebuilt = ", even in an engine built anew from these weights" if report.rebuilt else ""
    return (
        f"{worker}: after loading weights version {report.version}, its logprobs of the canary differ from the "
        f"trainer's by {report.canary_gap:.4g} a token (tolerance {tolerance:.4g}){rebuilt}. Likely causes: the worker "
        f"computes in another dtype than the trainer (rollout.dtype), NaN in the weights, or a vLLM model whose forward "
        f"differs from transformers'. If the gap is rounding, raise rollout.canary_tolerance, which is by default twice "
        f"the gap of the run's first sync"
    )


def _list(kind: str, names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{kind}: {', '.join(names[:limit])}{more}" if names else ""


def _checkpoint_shapes(folder: Path) -> Shapes:
    """Return names and shapes of the folder's weights, without those that its text-only class ignores and that nobody
    trains; empty where there are none."""
    shapes = {name: stored.shape for name, stored in stored_tensors(folder).items()}
    from rlqwen.models.carried_weights import ignored_in_folder

    for name in ignored_in_folder(folder, shapes):
        del shapes[name]
    return shapes


def _float32_names(folder: Path) -> set[str]:
    from rlqwen.models.float32_weights import float32_weights

    return set(float32_weights(folder))
