"""CPUs, GPUs and memory that the rollout workers ask for, against what this machine has."""

import os
from dataclasses import dataclass
from importlib.util import find_spec

from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError

_GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What there is to ask for."""

    num_cpus: int
    num_gpus: int
    memory_bytes: int


def this_machine() -> Machine:
    """CPUs that this process may use, GPUs and memory."""
    import psutil
    import torch

    return Machine(os.cpu_count() or 1, torch.cuda.device_count(), psutil.virtual_memory().total)


def check_resources(rollout: RolloutConfig, machine: Machine, model_bytes: int = 0) -> str:
    """One line that says what the workers ask for; raises ResourceError, with the arithmetic, if it is too much.

    `model_bytes`: size of the weights, 0 where unknown. A cluster (`ray_address`) is not looked into.
    """
    if rollout.engine == "vllm" and find_spec("vllm") is None:
        raise ResourceError(
            "rollout.engine is vllm, which is not installed: pip install 'rlqwen[cuda]' or 'rlqwen[cpu]'"
        )
    if rollout.engine == "transformers" or (rollout.engine is None and find_spec("vllm") is None):
        return "transformers engine in the trainer's process"
    if rollout.ray_address is not None:
        return f"{_workers(rollout)} on the Ray cluster at {rollout.ray_address}, whose resources were not looked into"
    asked = [_check_cpus(rollout, machine)]
    if machine.num_gpus or rollout.num_gpus_per_worker:
        asked.append(_check_gpus(rollout, machine))
    else:
        asked.append(_check_memory(rollout, machine, model_bytes))
    return f"{_workers(rollout)}: {', '.join(asked)}"


def _workers(rollout: RolloutConfig) -> str:
    return f"{rollout.num_workers} vLLM worker{'s' if rollout.num_workers > 1 else ''}"


def _check_cpus(rollout: RolloutConfig, machine: Machine) -> str:
    each = rollout.num_cpus_per_worker
    if each is None:
        return f"an equal share of {machine.num_cpus} CPUs each"
    asked = rollout.num_workers * each
    arithmetic = f"{rollout.num_workers} x {each:g} = {asked:g} CPUs"
    if asked > machine.num_cpus:
        raise ResourceError(
            f"rollout: num_workers x num_cpus_per_worker asks Ray for {arithmetic}, but this machine has "
            f"{machine.num_cpus}; lower one of them, or set rollout.ray_address for a cluster"
        )
    return f"{arithmetic} of {machine.num_cpus}"


def _check_gpus(rollout: RolloutConfig, machine: Machine) -> str:
    each = rollout.tensor_parallel_size if rollout.num_gpus_per_worker is None else rollout.num_gpus_per_worker
    asked = rollout.num_workers * each
    arithmetic = f"{rollout.num_workers} x {each:g} = {asked:g} GPUs"
    if asked > machine.num_gpus:
        raise ResourceError(
            f"rollout: num_workers x num_gpus_per_worker asks Ray for {arithmetic}, but this machine has "
            f"{machine.num_gpus}; lower one of them, or set rollout.ray_address for a cluster"
        )
    return f"{arithmetic} of {machine.num_gpus}"


def _check_memory(rollout: RolloutConfig, machine: Machine, model_bytes: int) -> str:
    weights = model_bytes / _GIB
    asked = rollout.num_workers * (rollout.kv_cache_gib + weights)
    there = machine.memory_bytes / _GIB
    arithmetic = f"{rollout.num_workers} x ({rollout.kv_cache_gib} KV cache + {weights:.1f} weights) = {asked:.1f} GiB"
    if asked > there:
        raise ResourceError(
            f"rollout: the workers need {arithmetic} of memory, but this machine has {there:.1f}; "
            "lower rollout.num_workers or rollout.kv_cache_gib"
        )
    return f"{arithmetic} of {there:.1f} memory"
