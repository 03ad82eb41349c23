"""Decide where engines run, on the trainer's GPUs or on others, and what follows from that.

With `colocate` engine and trainer take turns on the same GPUs: the engine sleeps while the policy trains. With `separate`
the first GPUs of the machine are the ranks', and the workers have the rest.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlqwen.config import ParallelConfig, RolloutConfig
from rlqwen.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from torch import nn

    from rlqwen.rollout.engine import Engine

ALONE, SHARED = 0.9, 0.4
"""Share of a GPU's memory for an engine that has it to itself, and for one that never sleeps beside the trainer."""

_HOW = {
    "ipc": "from GPU memory that both map (ipc)",
    "nccl": "by NCCL broadcast (nccl)",
    "object_store": "through Ray's object store",
}


@dataclass(frozen=True)
class Machine:
    """The GPUs that this process sees, and the ranks that train on them."""

    gpus: tuple[str, ...]
    """As in CUDA_VISIBLE_DEVICES."""
    local_ranks: int = 1
    """Ranks on this machine; rank i trains on GPU i."""
    world_size: int = 1
    """Ranks on all machines."""
    trains_on_gpu: bool = False


@dataclass(frozen=True)
class Placement:
    """Hold what a config's rollout section comes to on this machine."""

    config: RolloutConfig
    """With `num_workers` and `weight_transfer` resolved, and `gpu_memory_utilization` unless the worker measures it."""
    gpus: tuple[str, ...] | None = None
    """GPUs for Ray; None: those that it finds."""
    sleep_level: int = 0
    """vLLM's level of sleep while the policy trains; 0: engines never sleep."""
    resends: bool = False
    """Whether the policy's weights may be read again while groups are sampled from them."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user on what was chosen."""


def this_machine(device_type: str) -> Machine:
    """Read GPUs and ranks from torch and the launcher's environment; `device_type`: what the policy trains on."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()] or [str(index) for index in range(count)]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    return Machine(tuple(names[:count]), local_ranks, world_size, device_type == "cuda")


def place(
    config: RolloutConfig,
    machine: Machine,
    *,
    sends_adapter: bool = False,
    transfers: Sequence[str] = ("object_store",),
    can_sleep: bool = False,
    trains_meanwhile: bool = False,
) -> Placement:
    """Resolve `config` on `machine`.

    Args:
        sends_adapter: workers are sent the adapter alone.
        transfers: values of `rollout.weight_transfer` that the engine takes.
        can_sleep: the engine can free its memory.
        trains_meanwhile: the policy trains on groups while others are sampled.

    Raises ConfigError or ResourceError if the machine, or the rest of the config, does not allow what it asks for.
    """
    on_gpu = samples_on_gpu(config, machine)
    if config.placement == "separate":
        _check_separate(config, machine, on_gpu)
    gpus = _gpus_for_ray(config, machine) if on_gpu else None
    count = count_workers(config, machine)
    sleeps = can_sleep and take_turns(config, machine, trains_meanwhile=trains_meanwhile)
    level = (1 if sends_adapter else 2) if sleeps else 0
    transfer = _transfer(config, machine, count, on_gpu=on_gpu, sends_adapter=sends_adapter, transfers=transfers)
    share = config.gpu_memory_utilization
    if share is None and not level:
        share = ALONE if config.placement == "separate" else SHARED
    resolved = config.model_copy(
        update={"num_workers": count, "weight_transfer": transfer, "gpu_memory_utilization": share}
    )
    notes = _notes(resolved, machine, level, can_sleep=can_sleep) if on_gpu else []
    resends = not config.max_staleness and machine.world_size == 1
    return Placement(resolved, gpus, level, resends, notes)


def place_engine(config: RolloutConfig, engine: "type[Engine]", machine: Machine, **options: bool) -> Placement:
    """Resolve `config` for an engine; see `place`.

    Raises ConfigError if an engine in the trainer's process is asked to be elsewhere.
    """
    if engine.in_workers:
        return place(config, machine, transfers=engine.weight_transfers, can_sleep=engine.sleeps, **options)
    for key, usual in (("placement", "colocate"), ("weight_transfer", "auto")):
        if getattr(config, key) != usual:
            raise ConfigError(
                f"rollout.{key}={getattr(config, key)} is for engines in workers, and {engine.title} samples in the trainer's "
                "own process: leave it out, or use vllm"
            )
    return Placement(config)


def samples_on_gpu(config: RolloutConfig, machine: Machine) -> bool:
    """Return whether workers have GPUs: as `num_gpus_per_worker` says, else if the machine has any."""
    each = config.num_gpus_per_worker
    return bool(machine.gpus) if each is None else each > 0


def take_turns(config: RolloutConfig, machine: Machine, *, trains_meanwhile: bool = False) -> bool:
    """Return whether trainer and workers need the same GPUs, never at the same time, and free their memory in between."""
    overlap = config.max_staleness > 0 or trains_meanwhile
    return config.sleep and shares_gpus(config, machine) and not overlap


def shares_gpus(config: RolloutConfig, machine: Machine) -> bool:
    """Return whether workers are on the GPUs that the ranks train on."""
    own = config.placement == "separate" or config.ray_address is not None
    return not own and machine.trains_on_gpu and samples_on_gpu(config, machine)


def count_workers(config: RolloutConfig, machine: Machine) -> int:
    """Return `num_workers`, or how many fill the GPUs; 1 on a CPU, and on a cluster, whose size is not known yet."""
    if config.num_workers is not None:
        return config.num_workers
    on_gpu = samples_on_gpu(config, machine) and config.ray_address is None
    gpus = (_gpus_for_ray(config, machine) or machine.gpus) if on_gpu else None
    if not gpus or config.num_gpus_per_worker not in (None, config.tensor_parallel_size):
        return 1
    return max(1, len(gpus) // config.tensor_parallel_size)


def _check_separate(config: RolloutConfig, machine: Machine, on_gpu: bool) -> None:
    if not on_gpu:
        raise ConfigError(
            "rollout.placement=separate divides GPUs between ranks and workers, and there are none for the workers: leave it out"
        )
    left = len(machine.gpus) - machine.local_ranks
    if config.ray_address is None and left < config.tensor_parallel_size:
        raise ResourceError(
            f"rollout.placement=separate leaves {max(left, 0)} of {len(machine.gpus)} GPUs to the workers, because "
            f"{machine.local_ranks} rank(s) train on the first, and an engine needs {config.tensor_parallel_size} "
            "(rollout.tensor_parallel_size): start fewer ranks (--nproc-per-node), or set placement to colocate"
        )


def _gpus_for_ray(config: RolloutConfig, machine: Machine) -> tuple[str, ...] | None:
    """Return the GPUs of a private Ray; None: all that it finds."""
    if config.ray_address is not None or not machine.trains_on_gpu:
        return None
    if config.placement == "separate":
        return machine.gpus[machine.local_ranks :]
    needed = (config.num_workers or 1) * config.tensor_parallel_size
    return machine.gpus[: max(machine.local_ranks, needed)]


def _transfer(
    config: RolloutConfig,
    machine: Machine,
    count: int,
    *,
    on_gpu: bool,
    sends_adapter: bool,
    transfers: Sequence[str],
) -> str:
    asked = config.weight_transfer
    obstacles = {"object_store": ""}
    common = ""
    if sends_adapter:
        common = "workers are sent the adapter alone (rollout.lora), which is small"
    elif not on_gpu or not machine.trains_on_gpu:
        common = "trainer and workers must both be on GPUs"
    for name in ("ipc", "nccl"):
        obstacles[name] = common or ("" if name in transfers else "the engine does not take it")
    one_to_one = (
        count * config.tensor_parallel_size == machine.world_size == machine.local_ranks and config.ray_address is None
    )
    if config.placement == "separate":
        obstacles["ipc"] = (
            obstacles["ipc"] or "it needs a GPU that worker and trainer share (rollout.placement=colocate)"
        )
    else:
        obstacles["nccl"] = obstacles["nccl"] or (
            "NCCL connects no two processes on one GPU: it needs rollout.placement=separate"
        )
        if not one_to_one:
            obstacles["ipc"] = obstacles["ipc"] or "it needs a rank and a worker on each GPU, all on one machine"
    if asked == "auto":
        # With several ranks nothing could be sent to a worker that replaces another.
        names = ("ipc", "nccl", "object_store") if machine.world_size == 1 else ("nccl", "object_store")
        return next(name for name in names if not obstacles[name])
    if obstacles[asked]:
        raise ConfigError(
            f"rollout.weight_transfer={asked} is impossible: {obstacles[asked]}; leave it out, or set object_store"
        )
    return asked


def _notes(resolved: RolloutConfig, machine: Machine, level: int, *, can_sleep: bool) -> list[str]:
    shared = shares_gpus(resolved, machine)
    where = "on the trainer's GPUs" if shared else "on other GPUs"
    how = _HOW[resolved.weight_transfer]
    sleeping = f", and sleep (level {level}) while the policy trains" if level else ""
    notes = [f"{resolved.num_workers} rollout worker(s) {where} get weights {how}{sleeping}"]
    if shared and can_sleep and not level:
        why = "they sample while the policy trains" if resolved.sleep else "rollout.sleep is false"
        notes.append(
            f"rollout workers on the trainer's GPUs do not sleep, because {why}: each takes "
            f"rollout.gpu_memory_utilization={resolved.gpu_memory_utilization:g} of a GPU; rollout.placement=separate gives "
            "them GPUs of their own"
        )
    return notes


def growth_of(trained: "Iterable[nn.Parameter]", parallel: ParallelConfig, world_size: int) -> int:
    """Return the bytes that training will add to a rank's GPU while workers are awake: of the optimizer, for each `trained`
    parameter a float32 master weight and two moments."""
    if parallel.offload_optimizer:
        return 0
    count: int = sum(getattr(weight, "ds_numel", weight.numel()) for weight in trained)
    return 12 * count // (world_size if parallel.zero_stage else 1)


def environment_of_ray(gpus: tuple[str, ...] | None, environment: Mapping[str, str]) -> dict[str, str | None]:
    """Return the variables to change while Ray starts, None for those to remove, so that its processes inherit them.

    torchrun's describe this process's rank, and an engine would take them for its own.
    """
    changes: dict[str, str | None] = {
        name: None
        for name in environment
        if name in _OF_A_RANK or name.startswith(("TORCHELASTIC_", "ROLE_", "GROUP_"))
    }
    return changes if gpus is None else changes | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


_OF_A_RANK = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
