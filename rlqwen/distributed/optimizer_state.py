"""Save an optimizer's state as safetensors and JSON, by the names of parameters; nothing is pickled.

The files do not depend on the number of ranks and the ZeRO stage, so a run may resume with others.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from rlqwen.distributed.state_parts import read_layout, read_parts
from rlqwen.errors import ConfigError

TENSORS_FILE = "optimizer.safetensors"
PARTS_FOLDER = "optimizer"
"""Holds the tensors instead if ranks share the weights: a file of each rank."""
PLAIN_FILE = "optimizer.json"
MASTER = "master"
"""Key of a parameter's float32 value, if the model computes with a rounded one."""
_BLOCK, _CODES = 256, 256
"""Numbers that share a scale in bitsandbytes' 8-bit moments, and numbers that 8 bits stand for."""
_BY_GROUP = ("base_lrs", "_last_lr", "lr_lambdas")
"""Entries of a schedule's state that hold one value per parameter group."""


def save_optimizer(
    folder: Path,
    tensors: Mapping[str, Tensor] | None,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    memory: Mapping[str, Any],
) -> None:
    """Write `tensors` (`parameter/key`; None: they are in parts), each group's hyperparameters, the schedule, plain values."""
    if tensors is not None:
        save_file(dict(tensors), folder / TENSORS_FILE)
    states = [scheduler.state_dict() for scheduler in schedulers]
    joined = {key: [entry for state in states for entry in state[key]] for key in _BY_GROUP if key in states[0]}
    plain = {
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in optimizers
            for group in optimizer.param_groups
        ],
        "scheduler": states[0] | joined,
        **memory,
    }
    (folder / PLAIN_FILE).write_text(json.dumps(plain, indent=1) + "\n", "utf-8")


def refuse_other_shapes(name: str, saved: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Raise ConfigError if the saved state of a parameter has another shape, which a kernel would read out of bounds, and
    DeepSpeed would cut or fill up to its shards.

    `shape`: of the whole weight.
    """
    sizes = {"step": 1, "qmap1": _CODES, "qmap2": _CODES}
    sizes |= dict.fromkeys(("absmax1", "absmax2"), -(-math.prod(shape) // _BLOCK))
    for key, tensor in saved.items():
        fits = tensor.numel() == sizes[key] if key in sizes else tuple(tensor.shape) == shape
        if not fits:
            wanted = f"{sizes[key]} numbers" if key in sizes else f"the shape {shape}"
            raise ConfigError(
                f"{TENSORS_FILE} holds {key} of {name} with the shape {tuple(tensor.shape)}, and this run's has {wanted}: it "
                "is of another model"
            )


def read_tensors(
    folder: Path, place: Callable[[str, Tensor], Tensor], names: Collection[str], group: Any
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each parameter, by key, whether they were saved in parts or not; called on every rank.

    Raises ConfigError if the parameters are not those of `names`.

    Args:
        place: returns the tensor to read a parameter's into, given its name and one of its shape and dtype: this rank's part.
        group: a process group of all ranks; None: there is one.
    """
    if (folder / TENSORS_FILE).is_file() or not (folder / PARTS_FOLDER).is_dir():
        tensors = load_file(folder / TENSORS_FILE)
    else:
        layout = read_layout(folder / PARTS_FOLDER)
        tensors = {key: place(key.rpartition("/")[0], tensor) for key, tensor in layout.items()}
        read_parts(folder / PARTS_FOLDER, tensors, group)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        found.setdefault(name, {})[entry] = tensor
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ConfigError(
            f"the optimizer's state in {folder} is of parameters that are not trained now: {', '.join(unknown[:5])}"
        )
    return found


def restore_plain(folder: Path, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> dict[str, Any]:
    """Restore hyperparameters and schedule, and return the plain values."""
    plain: dict[str, Any] = json.loads((folder / PLAIN_FILE).read_text("utf-8"))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, saved in zip(groups, plain["groups"], strict=True):
        group |= {key: tuple(value) if isinstance(group.get(key), tuple) else value for key, value in saved.items()}
    before = 0
    for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
        own = slice(before, before + len(optimizer.param_groups))
        state = plain["scheduler"]
        scheduler.load_state_dict(state | {key: state[key][own] for key in _BY_GROUP if key in state})
        before = own.stop
    return plain
