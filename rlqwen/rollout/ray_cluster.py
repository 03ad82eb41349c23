"""Connect to Ray: a private cluster on this machine, a given cluster, or the one that the caller is connected to."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError, RolloutError, WorkerDied
from rlqwen.rollout import ray_reaper as guard
from rlqwen.rollout.engine_placement import environment_of_ray
from rlqwen.rollout.ray_calls import WatchedProcesses
from rlqwen.rollout.ray_environment import change_environment, temporary_files_in
from rlqwen.rollout.ray_leftovers import PREFIX, claim, clear_leftovers
from rlqwen.rollout.ray_store import take_room
from rlqwen.rollout.resources import WorkerResources, count_cpus, plan_object_store, plan_workers
from rlqwen.terminal import printable_lines

# Ray's sockets lie some 65 characters below its folder, and a socket's path may have 107.
_MAX_FOLDER_LENGTH = 40
MANY, GATHER_S = 100, 0.02
"""With more answers to come than `MANY`, gather them so long after the first, because Ray looks at each at every wait."""


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray, and a way to end what was started for it."""

    resources: WorkerResources
    log_folder: Path | None
    """Where a private cluster's processes write their logs."""
    disconnect: Callable[[], None]


def connect(config: RolloutConfig, *, sent_bytes: int, gpus: tuple[str, ...] | None = None) -> Cluster:
    """Connect to Ray as `config` says; raise ResourceError, before any wait, if the workers do not fit.

    `sent_bytes`: size of one version of what the workers are sent, from which the private object store is sized.
    `gpus`: those that a private cluster has; None: all that it finds.
    """
    # Read when Ray is imported: no usage reports; and no warning about workers that ask for no GPU.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # By default Ray ends the trainer 60 s after its gcs_server is gone, saved or not.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "3600")
    global _given
    import ray

    if _private is not None and ray.is_initialized():
        _private.watched.check()
        return _private.join(config)
    if _private is not None:  # others have called ray.shutdown
        _private.end()
    if ray.is_initialized():
        if _given is None:
            _given = _GivenCluster(is_ours=False)
        return _given.join(config)
    if config.ray_address is not None:
        try:
            ray.init(address=config.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ResourceError(
                f"rollout.ray_address {config.ray_address!r}: no Ray cluster answers ({error})"
            ) from None
        _given = _GivenCluster(is_ours=True)
        return _given.join(config)
    plan_workers(config, gpus=gpus)
    return _start_private(sent_bytes, gpus).join(config)


class _PrivateCluster:
    """Start a private Ray on this machine, which ends with the last pool that uses it."""

    def __init__(self, guard: "subprocess.Popen[bytes]", owner: IO[bytes], session: Path, pids: dict[int, str]) -> None:
        self._guard = guard
        self._owner = owner
        self._logs = session / "logs"
        self._num_users = 0
        self.watched = WatchedProcesses(pids)

    def join(self, config: RolloutConfig) -> Cluster:
        resources = _plan_on_cluster(config)
        self._num_users += 1
        return Cluster(resources, self._logs, self._leave)

    def _leave(self) -> None:
        import ray

        self._num_users -= 1
        if self._num_users:
            return
        with contextlib.suppress(RolloutError):  # lost, before or in the middle of it
            self.watched.close(ray.shutdown)
        if self.watched.is_lost:
            # Without its processes a call to Ray would hang, or end this process; the guard kills them afterwards.
            self._tell_guard()
            return
        self.end()

    def end(self) -> None:
        """Let the guard clear what is left, once nothing here calls this Ray any more."""
        global _private
        _private = None
        self._tell_guard()
        self._guard.communicate()
        self._owner.close()

    def _tell_guard(self) -> None:
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):  # somebody killed it
            self._guard.stdin.write(guard.TOLD)
            self._guard.stdin.flush()


class _GivenCluster:
    """Hold the connection to a cluster that others started; it ends with the last pool that uses it, if it is ours."""

    def __init__(self, *, is_ours: bool) -> None:
        import ray

        self._is_ours = is_ours
        self._num_users = 0
        # With Ray Client all calls go through a server of Ray's, which tells when it loses the others.
        is_client = ray.util.client.ray.is_connected()
        self.watched = WatchedProcesses({} if is_client else _own_raylet(), None if is_client else ray.nodes)

    def join(self, config: RolloutConfig) -> Cluster:
        self._num_users += 1
        try:
            self.watched.check()
            return Cluster(_plan_on_cluster(config), None, self._leave)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        global _given
        import ray

        self._num_users -= 1
        if self._num_users or self.watched.is_lost:
            return
        self.watched.end()
        _given = None
        if self._is_ours:
            ray.shutdown()


def _own_raylet() -> dict[int, str]:
    """Return the raylet that this process is connected to, as process id -> name; nothing if it is not to be seen here."""
    import ray

    mark = f"--node_id={ray.get_runtime_context().get_node_id()}"
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and mark in process.cmdline():
                found[process.pid] = "raylet"
    return found


_private: _PrivateCluster | None = None
_given: _GivenCluster | None = None


def _start_private(sent_bytes: int, gpus: tuple[str, ...] | None) -> _PrivateCluster:
    global _private
    import ray

    base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= _MAX_FOLDER_LENGTH else "/tmp"
    clear_leftovers(Path(base))
    store = plan_object_store(sent_bytes, Path(base))
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=base)
    owner = claim(Path(folder))
    command = [sys.executable, "-I", str(Path(guard.__file__)), str(os.getpid()), folder]
    # In a session of its own, so that Ctrl-C doesn't reach it.
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    changes = environment_of_ray(gpus, os.environ) | temporary_files_in(folder)
    own = {name: os.environ.get(name) for name in [*changes, guard.MARK]}
    change_environment(changes | {guard.MARK: folder})
    # Ray's processes inherit it: the trainer still needs them to save when its terminal is closed. Ray sees to SIGINT.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        context: Any = ray.init(
            address="local",
            num_cpus=int(count_cpus()),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=store.num_bytes,
            # Without it Ray would choose by a rule of its own, and warn.
            _plasma_directory=folder if store.on_disk else None,
            _temp_dir=folder,
            _system_config={"gcs_rpc_server_reconnect_timeout_s": 3600},  # see connect
        )
        pids = {pid: name for name in ("gcs_server", "raylet") for pid in _children(name)}
        take_room(store, pids, Path(folder))
    except BaseException:
        watcher.communicate(guard.TOLD)
        owner.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # What the trainer starts from here on is not Ray's.
        change_environment(own)
    _silence(ray)
    _private = _PrivateCluster(watcher, owner, Path(context.address_info["session_dir"]), pids)
    return _private


def _silence(ray: Any) -> None:
    """Keep Ray from printing the log of a raylet that dies, whose loss is an error with a message of its own."""
    with contextlib.suppress(AttributeError):
        ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _children(name: str) -> list[int]:
    """Return the processes of this name that this process has started."""
    return [process.pid for process in psutil.Process().children() if process.name() == name]


def is_lost() -> bool:
    """Return whether Ray lost a process that every call needs, so that nothing may call Ray any more."""
    joined = _private or _given
    return joined is not None and joined.watched.is_lost


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function`, which calls Ray, returns; RolloutError if a process that Ray needs is lost."""
    joined = _private or _given
    return function(*arguments) if joined is None else joined.watched.call(function, *arguments)


def _plan_on_cluster(config: RolloutConfig) -> WorkerResources:
    """Return what each worker asks for; raise ResourceError if the cluster lacks it, or if others hold it."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    resources = plan_workers(config, nodes=[(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive])
    free: dict[str, float] = ray.available_resources()
    for what, each in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)):
        if each * config.worker_count > free.get(what, 0.0) + 1e-6:
            raise ResourceError(
                f"rollout: {config.worker_count} workers x {each:g} {what}s = {config.worker_count * each:g} {what}s, but "
                f"only {free.get(what, 0.0):g} of the Ray cluster's are free; is another trainer still open?"
            )
    return resources


def put(value: Any) -> Any:
    """Put `value` into the object store and return a reference; raise ResourceError if there is no room for it."""
    import ray

    try:
        return call(ray.put, value)
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        total: float = ray.cluster_resources().get("object_store_memory", 0.0)
        raise ResourceError(
            f"Ray's object store ({total / 1e9:.3g} GB) has no room for a version of the weights, and none is left on "
            "the disk that it would spill to: free that disk (the temporary folder), or start the cluster with more, "
            "`ray start --object-store-memory BYTES`"
        ) from error


def reserve(config: RolloutConfig, resources: WorkerResources) -> Any:
    """Reserve a placement group with a bundle for each worker: all of them or none, so that a replaced worker finds its
    place free. Each lies on one machine, tensor-parallel ones too, for Ray splits no bundle.

    Raises ResourceError, with what the cluster has, if it is not there within `start_timeout`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundle = {"CPU": resources.num_cpus} | ({"GPU": resources.num_gpus} if resources.num_gpus else {})
    group: Any = placement_group([bundle] * config.worker_count, strategy="PACK")
    if not ray.wait([group.ready()], timeout=config.start_timeout)[0]:
        remove_placement_group(group)
        free: dict[str, float] = ray.available_resources()
        raise ResourceError(
            f"rollout: {config.worker_count} workers of {bundle} found no place on the Ray cluster within "
            f"rollout.start_timeout = {config.start_timeout:g} s; free now: {free.get('CPU', 0.0):g} CPUs, "
            f"{free.get('GPU', 0.0):g} GPUs. Lower rollout.num_workers, or end what else runs there"
        )
    return group


def wait(references: list[Any], *, timeout_s: float) -> list[Any]:
    """Return the references that have an answer, as soon as one has; none after `timeout_s`."""
    import ray

    def gather() -> list[Any]:
        ready, rest = ray.wait(references, timeout=timeout_s, fetch_local=True)
        if ready and rest:
            if len(rest) > MANY:
                time.sleep(GATHER_S)
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return ready

    ready: list[Any] = call(gather)
    return ready


def answer(reference: Any) -> Any:
    """Return what an actor answered, or the error; WorkerDied if the actor failed and not the call."""
    import ray

    try:
        return call(ray.get, reference)
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, RolloutError) else RolloutError(str(error))
    except ray.exceptions.RayError as error:
        return WorkerDied(str(error))


def log_tail(folder: Path | None, pid: int | None, lines: int = 15) -> str:
    """Return the last lines that the worker with process id `pid` wrote to its error log."""
    if folder is None or pid is None:
        return ""
    text = ""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"worker-*-{pid}.err"):
            text += path.read_text("utf-8", errors="replace")
    tail = [line for line in printable_lines(text) if line.strip()][-lines:]
    return "\nIts last words:\n" + "\n".join(tail) if tail else ""
