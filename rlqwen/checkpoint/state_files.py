"""Write nested JSON values and tensors as a JSON file and a safetensors file. Nothing is pickled."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlqwen.errors import ConfigError, InputError, RlqwenError

_TENSOR = "__tensor__"


def write_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write `state` to `name.json`, and its tensors to `name.safetensors`. Tuples become lists."""
    tensors: dict[str, Tensor] = {}
    plain = _take_out(state, "", tensors)
    (folder / f"{name}.json").write_text(json.dumps(plain, indent=1) + "\n", "utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """Read what `write_state` wrote. Tensors are on the CPU. Raises ConfigError if it is not that."""
    path = folder / f"{name}.safetensors"
    try:
        plain = json.loads((folder / f"{name}.json").read_text("utf-8"))
        state = _put_back(plain, load_file(path) if path.is_file() else {})
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ConfigError(
            f"{folder}: {name}.json is no state that rlqwen wrote ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(state, dict):
        raise ConfigError(f"{folder}: {name}.json is no state that rlqwen wrote (it holds a {type(state).__name__})")
    return state


@contextlib.contextmanager
def refusing_foreign_state(folder: Path) -> Iterator[None]:
    """Raise ConfigError, which names the checkpoint, if its state is not what the parts of this run can take."""
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RecursionError,
        RuntimeError,
        OSError,
    ) as error:
        if isinstance(error, InputError) and str(folder) not in str(error):
            raise ConfigError(f"checkpoint {str(folder)!r} cannot be resumed from: {error}") from None
        # Not for what is of this machine or already explained: memory, a lost rank, a full disk.
        if isinstance(error, RlqwenError) or (
            isinstance(error, RuntimeError) and type(error) not in (RuntimeError, RecursionError)
        ):
            raise
        message = f"checkpoint {str(folder)!r} holds the state of another run, or none that rlqwen wrote"
        raise ConfigError(f"{message} ({type(error).__name__}: {error})") from error


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
