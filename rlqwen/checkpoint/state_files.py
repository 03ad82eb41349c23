"""Write nested JSON values and tensors as a JSON file and a safetensors file. Nothing is pickled."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSOR = "__tensor__"


def write_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write `state` to `name.json`, and its tensors to `name.safetensors`. Tuples become lists."""
    tensors: dict[str, Tensor] = {}
    plain = _take_out(state, "", tensors)
    (folder / f"{name}.json").write_text(json.dumps(plain, indent=1) + "\n", "utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """Read what `write_state` wrote. Tensors are on the CPU."""
    plain = json.loads((folder / f"{name}.json").read_text("utf-8"))
    path = folder / f"{name}.safetensors"
    state: dict[str, Any] = _put_back(plain, load_file(path) if path.is_file() else {})
    return state


def _take_out(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # Copied, because safetensors refuses tensors that share memory.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {key: _take_out(inner, f"{path}/{key}" if path else str(key), tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_take_out(inner, f"{path}/{place}", tensors) for place, inner in enumerate(value)]
    return value


def _put_back(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_back(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_put_back(inner, tensors) for inner in value]
    return value
