"""Bring a version of the weights to the workers: through Ray's object store, or from GPU to GPU."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rlqwen.errors import RolloutError
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.engine_placement import Placement
from rlqwen.rollout.weight_sync import ExpectedWeights, WeightBundle, publish
from rlqwen.rollout.worker_protocol import transfer_of
from rlqwen.types import Canary

if TYPE_CHECKING:
    import torch

    Weights = Iterable[tuple[str, torch.Tensor]]
    SendByAllRanks = Callable[[Any, Callable[[Weights], None]], None]


class ExportedWeights:
    """Weights that can be read several times, each time as they are then."""

    def __init__(self, export: "Callable[[], Weights]", send_by_all_ranks: "SendByAllRanks | None" = None) -> None:
        self._export = export
        self.send_by_all_ranks = send_by_all_ranks
        """See MainRank; None with one rank."""

    def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]":
        return iter(self._export())


def help_send(task: Any, weights: "Weights", rank: int) -> None:
    """Send this rank's weights to the worker on its GPU, as the main rank's `task` says."""
    _quieten_vllm()
    from rlqwen.rollout.engines.vllm_device_transfer import send_own_part

    send_own_part(task, weights, rank)


def _quieten_vllm() -> None:
    """Set what vLLM reads when it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class WeightDelivery(Protocol):
    """Hold what workers are sent, which they confirm by loading its bundle."""

    needs_workers: bool
    """Whether every worker must be up before anything is sent."""

    def publish(self, version: int, weights: "Weights", canary: Canary | None, handles: Sequence[Any]) -> WeightBundle:
        """Send a version; `handles`: Ray's handles of all workers."""
        ...

    def resend(self, handle: Any) -> None:
        """Send the present version to a worker that replaced another, before it loads the bundle."""
        ...


class StoreDelivery:
    """Put weights into Ray's object store, where any worker can read them at any time."""

    needs_workers = False

    def __init__(self, expected: ExpectedWeights, dtype: str) -> None:
        self._expected = expected
        self._dtype = dtype

    def publish(self, version: int, weights: "Weights", canary: Canary | None, handles: Sequence[Any]) -> WeightBundle:
        """Put the weights into the store."""
        return publish(version, weights, canary, dtype=self._dtype, expected=self._expected, put=cluster.put)

    def resend(self, handle: Any) -> None:
        """Do nothing, because the bundle names what lies in the store."""


class DeviceDelivery:
    """Send weights from the trainer's GPU into the engines; nothing holds a copy."""

    needs_workers = True

    def __init__(
        self,
        backend: str,
        expected: ExpectedWeights,
        dtype: str,
        *,
        processes_per_engine: int,
        timeout_s: float,
        resends: bool,
    ) -> None:
        """Send by `ipc` or `nccl`.

        Args:
            processes_per_engine: GPUs of one engine.
            timeout_s: for one sync.
            resends: whether the policy's weights may be read again while groups are sampled from them.
        """
        _quieten_vllm()
        from rlqwen.rollout.engines.vllm_device_transfer import DeviceTransfer

        self._backend = backend
        self._resends = resends
        self._weights: Weights = ()
        self._transfer = DeviceTransfer(
            backend, expected=expected, dtype=dtype, processes_per_engine=processes_per_engine, timeout_s=timeout_s
        )

    def publish(self, version: int, weights: "Weights", canary: Canary | None, handles: Sequence[Any]) -> WeightBundle:
        """Send the weights to all workers."""
        self._weights = weights
        return WeightBundle(version, (), {}, canary, self._transfer.send(handles, weights))

    def resend(self, handle: Any) -> None:
        """Send the policy's weights once more; RolloutError if they may be newer by now, or are in shards."""
        if not self._resends:
            raise RolloutError(
                f"a rollout worker was replaced, and rollout.weight_transfer={self._backend} keeps no copy of the weights "
                "that the others sample from: with rollout.max_staleness the policy has newer ones by now, and with several "
                "ranks they cannot be gathered at this time. Resume from the last checkpoint, or set rollout.weight_transfer "
                "to object_store, which keeps a copy"
            )
        self._transfer.send([handle], self._weights)


def delivery_of(placement: Placement, expected: ExpectedWeights, dtype: str) -> WeightDelivery:
    """Return the delivery that a resolved config names."""
    config = placement.config
    if (backend := transfer_of(config)) == "object_store":
        return StoreDelivery(expected, dtype)
    return DeviceDelivery(
        backend,
        expected,
        dtype,
        processes_per_engine=config.tensor_parallel_size,
        timeout_s=config.sync_timeout,
        resends=placement.resends,
    )
