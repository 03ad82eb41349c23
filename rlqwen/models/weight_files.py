"""Write a model folder from a stream of weights, one shard at a time, so that memory never holds a second copy."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from rlqwen.errors import ModelError
from rlqwen.models.carried_weights import CarriedWeights, carried_by
from rlqwen.models.model_classes import whole_architecture
from rlqwen.terminal import warn

MAX_SHARD_BYTES = 5 * 1000**3
_HEAD = "lm_head.weight"


def write_model(
    folder: Path | str,
    model: PreTrainedModel,
    weights: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quantization: dict[str, Any] | None = None,
) -> int:
    """Write config, generation config and `weights`, which `from_pretrained` loads as `model`'s class.

    `weights` come under their checkpoint names; a tied head is left out. Weights that the model carries (see
    rlqwen.models.carried_weights) are copied too, with the full config. `quantization`: the config's entry on it.
    Returns the bytes of all weights. Raises ModelError, before anything is complete, if they are not the weights that a
    model of this config has.
    """
    folder = Path(folder)
    carried = carried_by(model) or CarriedWeights("nothing")
    carried.require_writable()
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if quantization is not None:
        config.quantization_config = quantization
    shards = _ShardWriter(folder, max_shard_bytes)
    dtypes: dict[torch.dtype, int] = {}
    missing = expected_shapes(model) if quantization is None else None
    for name, tensor in weights:
        if missing is not None:
            _check_weight(name, tensor, missing, model)
        if name == _HEAD and config.tie_word_embeddings:
            continue
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.numel()
        shards.add(name, tensor)
    if missing:
        raise ModelError(f"the weights to save lack {_listed(sorted(missing))}, which {type(model).__name__} has")
    for name, tensor in carried.tensors():
        shards.add(name, tensor)
    num_bytes = shards.close()
    config.dtype = max((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: dtypes[dtype])
    if model._auto_class is not None:
        custom_object_save(model, folder, config=config)
    _write_config(folder, config, model, carried)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return num_bytes


def _write_config(folder: Path, config: Any, model: PreTrainedModel, carried: CarriedWeights) -> None:
    if carried.whole_config is None:
        config.save_pretrained(folder)
    else:
        whole = carried.config_of(config, whole_architecture(model, carried.whole_config), config.dtype)
        (folder / "config.json").write_text(json.dumps(whole, indent=2) + "\n", "utf-8")
    for name, content in carried.files.items():
        (folder / name).write_bytes(content)


def expected_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]] | None:
    """Return checkpoint names and shapes of a model of the same class and config, without its weights.

    Adapters, quantization and engines do not change them. Returns None, with a warning, for a user's class whose
    constructor needs more than a config.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            plain = type(model)(config)
        weights = revert_weight_conversion(model, plain.state_dict())  # as this one was loaded
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        warn(f"names of saved weights are not checked, for {type(model).__name__}: {error}", stacklevel=2)
        return None
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _check_weight(name: str, tensor: Tensor, missing: dict[str, tuple[int, ...]], model: PreTrainedModel) -> None:
    """Remove `name` from `missing`; raise ModelError if it is not there or has another shape."""
    shape = missing.pop(name, None)
    if shape is None:
        raise ModelError(
            f"{name!r} is to be saved, and {type(model).__name__} has no such weight: a module of the model is wrapped in "
            "a way that rlqwen does not know"
        )
    if shape != tuple(tensor.shape):
        raise ModelError(f"{name!r} is to be saved as {list(tensor.shape)}, and its config says {list(shape)}")


def _listed(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class _ShardWriter:
    """Write safetensors files of at most `max_bytes`, and their index if there are several."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.names: list[list[str]] = []
        """Names of the weights in each file."""
        self.total = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self.max_bytes:
            self._flush()
        # Copy, because safetensors refuses tensors that share memory, and a view would keep its whole base in memory.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += num_bytes

    def _flush(self) -> None:
        save_file(self._pending, self._path(len(self.names)), metadata={"format": "pt"})
        self.names.append(list(self._pending))
        self.total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05d}.safetensors"

    def close(self) -> int:
        """Name the files as transformers does, and return the bytes of all weights."""
        self._flush()
        count = len(self.names)
        if count == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return self.total
        places: dict[str, str] = {}
        for number, names in enumerate(self.names):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.folder / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return self.total
