"""Compare what the rollout workers ask for with what this machine has."""

from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError
from rlqwen.rollout import plan_workers
from rlqwen.rollout.engine import engine_class
from rlqwen.rollout.engine_placement import place_engine, this_machine


def check_resources(rollout: RolloutConfig) -> str:
    """Return one line on the resources that the workers ask for.

    Raises ResourceError, with the arithmetic, if it is more than this machine has. A cluster (`ray_address`) is not
    checked.
    """
    engine = engine_class(rollout)
    if (why := engine.why_unavailable()) is not None:
        raise ResourceError(f"rollout.engine is {rollout.engine}: {why}")
    placement = place_engine(rollout, engine, this_machine("cuda"))
    rollout = placement.config
    if not engine.in_workers:
        return f"{engine.title} engine in the trainer's process, which is slow"
    workers = f"{rollout.worker_count} {engine.title} worker{'s' if rollout.worker_count > 1 else ''}"
    if rollout.ray_address is not None:
        return f"{workers} on the Ray cluster at {rollout.ray_address}, whose resources were not checked"
    each = plan_workers(rollout, gpus=placement.gpus)
    asked = [f"{each.num_cpus:g} CPUs", f"{each.num_gpus:g} GPUs" if each.num_gpus else ""]
    asked += [] if each.num_gpus else [f"{rollout.kv_cache_gib} GiB of KV cache"]
    return f"{workers} x {', '.join(part for part in asked if part)}"
