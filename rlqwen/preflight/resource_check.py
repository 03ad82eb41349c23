"""What the rollout workers ask for, against what this machine has."""

from importlib.util import find_spec

from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError
from rlqwen.rollout import plan_workers
from rlqwen.rollout.resources import uses_vllm


def check_resources(rollout: RolloutConfig) -> str:
    """One line that says what the workers ask for.

    Raises ResourceError, with the arithmetic, if it is more than this machine has. A cluster (`ray_address`) is not
    looked into.
    """
    if not uses_vllm(rollout):
        return "transformers engine in the trainer's process, which is slow"
    if find_spec("vllm") is None:
        raise ResourceError(
            "rollout.engine is vllm, which is not installed: pip install 'rlqwen[cuda]' or 'rlqwen[cpu]'"
        )
    workers = f"{rollout.num_workers} vLLM worker{'s' if rollout.num_workers > 1 else ''}"
    if rollout.ray_address is not None:
        return f"{workers} on the Ray cluster at {rollout.ray_address}, whose resources were not looked into"
    each = plan_workers(rollout)
    asked = [f"{each.num_cpus:g} CPUs", f"{each.num_gpus:g} GPUs" if each.num_gpus else ""]
    asked += [] if each.num_gpus else [f"{rollout.kv_cache_gib} GiB of KV cache"]
    return f"{workers} x {', '.join(part for part in asked if part)}"
