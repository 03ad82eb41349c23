"""Refuse weights that are missing, of another shape, no floating-point numbers, or NaN, by the name of the first ones."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from rlqwen.errors import ModelError
from rlqwen.models.hub import read_config, stored_tensors

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_OF_LAYERS = ("weight", "A_log", "dt_bias", "gate_up_proj", "down_proj")
"""Last parts of names that only weights have; a buffer, such as `position_ids`, may hold integers."""


def refuse_missing(name: str, missing: set[str], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise ModelError for weights that are not there, or not of the shape that the config asks for."""
    unfit = [f"{key} has {tuple(stored)} instead of {tuple(wanted)}" for key, stored, wanted in sorted(mismatched)]
    if unfit:
        raise ModelError(
            f"model {name!r} has weights of another shape than its config asks for: {_listed(unfit)}; config and "
            "weights are of different models"
        )
    if missing:
        raise ModelError(
            f"model {name!r} lacks weights, which would be random: {_listed(sorted(missing))}; its config "
            "names another class than its files are of, or a file is not whole"
        )


def copy_whole(name: str, saved: Tensor, weight: Tensor) -> None:
    """Copy a saved weight into a model's; raise ModelError for another shape, which torch would repeat if it can."""
    if saved.shape != weight.shape:
        raise ModelError(
            f"{name} has {tuple(saved.shape)} there instead of {tuple(weight.shape)}: it is of another model"
        )
    weight.data.copy_(saved)


def unquantized_part(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report of loading a quantized folder as a plain model, without what quantization changes.

    A quantized layer holds tensors that the plain class does not know, such as scales; its own weight may have another
    name and another shape. Norms, embeddings, heads and whole layers that are missing stay in the report.
    """
    layers = set()
    for key in report["unexpected_keys"]:
        layer = key.rpartition(".")[0]
        layers |= {layer, layer.removesuffix(".weight")}  # of `q_proj.qweight`, and of `q_proj.weight.absmax`

    def is_quantized(key: str) -> bool:
        layer = key.rpartition(".")[0]
        return layer in layers or any(other.startswith(f"{layer}.") for other in layers if "experts" in layer)

    return report | {
        "missing_keys": {key for key in report["missing_keys"] if not is_quantized(key)},
        "mismatched_keys": [entry for entry in report["mismatched_keys"] if not is_quantized(entry[0])],
    }


def refuse_integers(name: str, folder: Path) -> None:
    """Raise ModelError if a folder whose config says nothing of quantization has weights of integers or 8-bit floats.

    transformers would take them for the weights themselves, without their scales. Only headers are read.
    """
    if read_config(folder).get("quantization_config") is not None:
        return
    stored = stored_tensors(folder)
    unfit = [
        f"{key} ({tensor.dtype})"
        for key, tensor in sorted(stored.items())
        if tensor.dtype not in _FLOATS and key.rpartition(".")[2] in _OF_LAYERS
    ]
    if unfit:
        raise ModelError(
            f"model {name!r} has weights that are not of a 16-, 32- or 64-bit floating-point dtype: {_listed(unfit)}, and its "
            "config.json has no quantization_config that says how to read them: start from the unquantized model"
        )


def refuse_nonfinite(name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ModelError if weights hold NaN or infinite numbers, of which every output would be NaN.

    Each weight is read once, without a copy; of a sharded one, what this rank holds.
    """
    unfit = []
    for key, weight in weights:
        own = weight.detach()
        own = own.to_local() if isinstance(own, DTensor) else own
        if own.is_floating_point() and own.itemsize > 1 and own.numel() and not own.is_meta:
            low, high = own.aminmax()  # NaN if there is one: 20 times as fast as isfinite, which makes a mask
            if not (low.isfinite() & high.isfinite()):
                unfit.append(key)
    if unfit:
        raise ModelError(
            f"model {name!r} has weights with NaN or infinite numbers, of which every output would be NaN: {_listed(unfit)}: "
            "copy the files again, or take weights from before the training that made them so"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
