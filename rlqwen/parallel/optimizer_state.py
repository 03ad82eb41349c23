"""An optimiser's memory as safetensors and JSON, by the names of parameters; nothing is pickled."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlqwen.errors import ConfigError
from rlqwen.parallel.part import Part

TENSORS_FILE = "optimizer.safetensors"
PLAIN_FILE = "optimizer.json"


def save_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any, parts: Sequence[Part], *, nonfinite: int
) -> None:
    """Write the moments and counts of every parameter, each group's hyperparameters, and the schedule."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name, parameter in part.named():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(tensors, folder / TENSORS_FILE)
    plain = {
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        "scheduler": scheduler.state_dict(),
        "nonfinite_in_a_row": nonfinite,
    }
    (folder / PLAIN_FILE).write_text(json.dumps(plain, indent=1) + "\n", "utf-8")


def restore_optimizer(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any, parts: Sequence[Part]) -> int:
    """Put back what `save_optimizer` wrote; returns the updates skipped in a row. ConfigError if the parameters are
    others."""
    plain = json.loads((folder / PLAIN_FILE).read_text("utf-8"))
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / TENSORS_FILE).items():
        name, _, entry = key.rpartition("/")
        found.setdefault(name, {})[entry] = tensor
    named = {name: parameter for part in parts for name, parameter in part.named()}
    unknown = [name for name in found if name not in named]
    if unknown:
        raise ConfigError(
            f"{folder / TENSORS_FILE} remembers parameters that are not trained now: {', '.join(unknown[:5])}"
        )
    for name, entries in found.items():
        parameter = named[name]
        optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in entries.items()}
    for group, saved in zip(optimizer.param_groups, plain["groups"], strict=True):
        group |= {key: tuple(value) if isinstance(group[key], tuple) else value for key, value in saved.items()}
    scheduler.load_state_dict(plain["scheduler"])
    return int(plain["nonfinite_in_a_row"])
