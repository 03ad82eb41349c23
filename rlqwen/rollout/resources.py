"""How much each worker asks of Ray, checked against what there is before Ray is asked."""

import math
import os
from dataclasses import dataclass

from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError

PROCESS_GIB = 1.0
"""Memory of a worker's process beside weights and KV cache: torch and vLLM themselves."""


@dataclass(frozen=True)
class WorkerResources:
    """What one worker asks for."""

    num_cpus: float
    num_gpus: float

    @property
    def num_threads(self) -> int:
        """OpenMP threads of an engine on CPU."""
        return max(1, int(self.num_cpus))


def plan_workers(
    config: RolloutConfig, *, nodes: list[tuple[float, float]] | None = None, free_gib: float | None = None
) -> WorkerResources:
    """What each of `config.num_workers` workers asks for; ResourceError if the machines don't have it.

    `nodes`: CPUs and GPUs of each machine; None is this machine alone. `free_gib`: memory available on this machine
    for workers on CPU; None measures it. A worker never spans two machines.
    """
    nodes = nodes or [(count_cpus(), _count_gpus())]
    cpus, gpus = sum(node[0] for node in nodes), sum(node[1] for node in nodes)
    count = config.num_workers
    gpus_each = config.num_gpus_per_worker
    if gpus_each is None:
        gpus_each = config.tensor_parallel_size if gpus else 0
    cpus_each = config.num_cpus_per_worker
    if cpus_each is None:
        cpus_each = 1 if gpus else cpus / count
    for each, total, what, key in (
        (cpus_each, cpus, "CPUs", "rollout.num_cpus_per_worker"),
        (gpus_each, gpus, "GPUs", "rollout.num_gpus_per_worker"),
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
    needed = config.num_workers * (config.kv_cache_gib + PROCESS_GIB)
    if needed > free_gib:
        raise ResourceError(
            f"rollout: {config.num_workers} workers x ({config.kv_cache_gib} GiB KV cache + {PROCESS_GIB:g} GiB) = "
            f"{needed:g} GiB, but {free_gib:.1f} GiB of memory are free; lower rollout.num_workers or "
            f"rollout.kv_cache_gib"
        )


def count_cpus() -> float:
    """CPUs that this process may use."""
    return float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _count_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


def _free_gib() -> float:
    import psutil

    return float(psutil.virtual_memory().available) / 1024**3
