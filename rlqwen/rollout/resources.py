"""Compute what each worker asks of Ray, and check it against the machine before Ray is asked."""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError

PROCESS_GIB = 1.0
"""Memory of a worker's process besides weights and KV cache: torch and vLLM themselves."""
_SMALL_MODEL_BYTES = 32 * 1024**2
"""Below this size a second thread gained nothing (0.8 M parameters: 0.31 s per rollout against 0.27 s), and cost tenfold
while another process kept a core busy."""
SHARED_MEMORY = Path("/dev/shm")
STORE_SLACK_BYTES = 128 * 1024**2
"""Room in the object store besides the weights; Ray refuses a store below 75 MiB."""
_STORE_SHARE = 0.8
"""Share of the free shared memory that the object store may take."""
_DISK_STORE_BYTES = 1024**3
"""Largest store that is placed on disk if shared memory is too small: what a disk takes in about a second."""
ALLOW_DISK = "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"
"""Ray's own switch: a store of any size may lie on the disk."""


@dataclass(frozen=True)
class WorkerResources:
    """The resources that one worker asks for."""

    num_cpus: float
    num_gpus: float

    def threads_for(self, model: Path) -> int:
        """Return the OpenMP threads of an engine on CPU for the model in a folder."""
        num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        return max(1, int(self.num_cpus)) if num_bytes > _SMALL_MODEL_BYTES else 1


@dataclass(frozen=True)
class ObjectStore:
    """Ray's private object store, through which weights reach the workers."""

    num_bytes: int
    on_disk: bool
    """It lies in Ray's temporary folder, because shared memory is too small."""


def plan_object_store(
    sent_bytes: int, temporary_folder: Path, *, shared_bytes: int | None = None, disk_bytes: int | None = None
) -> ObjectStore:
    """Size the object store for versions of the weights of `sent_bytes`; raise ResourceError, with the arithmetic,
    if no place has room for one version.

    It holds the old and the new version where it can, and at least one, because the old one is dropped before the new
    one is put. `shared_bytes`, `disk_bytes`: free in /dev/shm and in `temporary_folder`; None measures them.
    """
    needed = sent_bytes + STORE_SLACK_BYTES
    free = _free_bytes(SHARED_MEMORY) if shared_bytes is None else shared_bytes
    if int(_STORE_SHARE * free) >= needed:
        return ObjectStore(min(needed + sent_bytes, int(_STORE_SHARE * free)), on_disk=False)
    if needed <= _DISK_STORE_BYTES or os.environ.get(ALLOW_DISK):
        free_disk = _free_bytes(temporary_folder) if disk_bytes is None else disk_bytes
        if int(_STORE_SHARE * free_disk) >= needed:
            return ObjectStore(needed, on_disk=True)
    raise ResourceError(
        f"rollout: the workers are sent {_gb(sent_bytes)} GB of weights + {_gb(STORE_SLACK_BYTES)} GB for the rest = "
        f"{_gb(needed)} GB of shared memory, but {_STORE_SHARE:g} x {_gb(free)} GB free in {SHARED_MEMORY} = "
        f"{_gb(_STORE_SHARE * free)} GB: give the container more (docker run --shm-size={math.ceil(needed / 0.7e9)}g), "
        f"send the adapter alone (rollout.lora=true, with model.lora), or set {ALLOW_DISK}=1 to use the disk under "
        f"{temporary_folder}, which is slower"
    )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g}"


def plan_workers(
    config: RolloutConfig,
    *,
    nodes: list[tuple[float, float]] | None = None,
    free_gib: float | None = None,
    gpus: tuple[str, ...] | None = None,
) -> WorkerResources:
    """Return what each of `config.num_workers` workers asks for; raise ResourceError if the machines do not have it.

    `nodes`: CPUs and GPUs of each machine; None is this machine alone. `free_gib`: memory available on this machine
    for workers on CPU; None measures it. `gpus`: those of this machine that workers may use; None: all. A worker never spans two machines.
    """
    nodes = nodes or [(count_cpus(), _count_gpus() if gpus is None else float(len(gpus)))]
    cpus, num_gpus = sum(node[0] for node in nodes), sum(node[1] for node in nodes)
    count = config.worker_count
    gpus_each = config.num_gpus_per_worker
    if gpus_each is None:
        gpus_each = config.tensor_parallel_size if num_gpus else 0
    cpus_each = config.num_cpus_per_worker
    if cpus_each is None:
        cpus_each = 1 if num_gpus else cpus / count
    for each, total, what, key in (
        (cpus_each, cpus, "CPUs", "rollout.num_cpus_per_worker"),
        (gpus_each, num_gpus, "GPUs", "rollout.num_gpus_per_worker"),
    ):
        fitting = sum(_fit(node[what == "GPUs"], each) for node in nodes)
        if fitting < count:
            raise ResourceError(
                f"rollout: {count} workers x {each:g} {what} = {count * each:g} {what}, but there are {total:g} on "
                f"{len(nodes)} machine(s), room for {fitting} worker(s); lower rollout.num_workers or {key}"
            )
    if not gpus_each and len(nodes) == 1:
        _check_memory(config, _free_gib() if free_gib is None else free_gib)
    return WorkerResources(cpus_each, gpus_each)


def _fit(available: float, each: float) -> int | float:
    return math.floor(available / each + 1e-6) if each else math.inf


def _check_memory(config: RolloutConfig, free_gib: float) -> None:
    needed = config.worker_count * (config.kv_cache_gib + PROCESS_GIB)
    if needed > free_gib:
        raise ResourceError(
            f"rollout: {config.worker_count} workers x ({config.kv_cache_gib} GiB KV cache + {PROCESS_GIB:g} GiB) = "
            f"{needed:g} GiB, but {free_gib:.1f} GiB of memory are free; lower rollout.num_workers or "
            f"rollout.kv_cache_gib"
        )


def count_cpus() -> float:
    """Return the number of CPUs that this process may use."""
    return float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def samples_on_gpu(config: RolloutConfig) -> bool:
    """Return whether workers will have GPUs: as `num_gpus_per_worker` says, else if this machine has any."""
    each = config.num_gpus_per_worker
    return _count_gpus() > 0 if each is None else each > 0


def shares_processors(config: RolloutConfig, device_type: str) -> bool:
    """Return whether workers compute where a trainer on such a device (`cpu`, `cuda`) does: on this machine, and both on
    its GPUs or both on its CPUs."""
    if config.placement == "separate" or config.ray_address is not None:
        return False
    return samples_on_gpu(config) == (device_type == "cuda")


def _count_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


def _free_gib() -> float:
    import psutil

    return float(psutil.virtual_memory().available) / 1024**3
