"""Ray itself: a private cluster on this machine, a given cluster, or the one that the caller is connected to."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError
from rlqwen.rollout.resources import WorkerResources, plan_workers

# Ray's sockets lie some 65 characters below its folder, and a socket's path may have 107.
_MAX_FOLDER_LENGTH = 40
_MIB = 1024**2
_MIN_STORE_BYTES = 128 * _MIB


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray, and how to end what was started for it."""

    resources: WorkerResources
    log_folder: Path | None
    """Where a private cluster's processes write their logs."""
    disconnect: Callable[[], None]


def connect(config: RolloutConfig, *, weight_bytes: int) -> Cluster:
    """Connect to Ray as `config` says; ResourceError if the workers would not fit, before anything waits for them.

    `weight_bytes`: size of the model's files, from which the private object store is sized.
    """
    # Read when Ray is imported: no usage reports; and no warning about workers that ask for no GPU.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return Cluster(plan_workers(config, nodes=_nodes()), None, lambda: None)
    if config.ray_address is not None:
        try:
            ray.init(address=config.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ResourceError(
                f"rollout.ray_address {config.ray_address!r}: no Ray cluster answers ({error})"
            ) from None
        return Cluster(plan_workers(config, nodes=_nodes()), None, ray.shutdown)
    return _start_private(config, weight_bytes)


def _start_private(config: RolloutConfig, weight_bytes: int) -> Cluster:
    import ray

    resources = plan_workers(config)
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="rlq-", dir=base if len(base) <= _MAX_FOLDER_LENGTH else "/tmp")
    context: Any = ray.init(
        address="local",
        num_cpus=max(1, round(resources.num_cpus * config.num_workers + 0.499)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Old and new weights, perhaps in a wider dtype than their files. Pages are taken only as they are used.
        object_store_memory=_MIN_STORE_BYTES + 4 * weight_bytes,
        _temp_dir=folder,
    )
    session = Path(context.address_info["session_dir"])

    def disconnect() -> None:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    return Cluster(resources, session / "logs", disconnect)


def _nodes() -> list[tuple[float, float]]:
    """CPUs and GPUs of each living machine of the cluster."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive]


def log_tail(folder: Path | None, pid: int | None, lines: int = 15) -> str:
    """The last lines that the worker with process id `pid` wrote to its error log, for the message of its death."""
    if folder is None or pid is None:
        return ""
    text = ""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"worker-*-{pid}.err"):
            text += path.read_text("utf-8", errors="replace")
    tail = [line for line in text.splitlines() if line.strip()][-lines:]
    return "\nIts last words:\n" + "\n".join(tail) if tail else ""
