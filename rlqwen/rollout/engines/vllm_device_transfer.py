"""Send weights from the trainer's GPU to vLLM's workers, by the trainer's side of vLLM's weight-transfer engines.

`ipc`: the worker maps a buffer that lies on the GPU it shares with a rank, and each rank fills one. `nccl`: the trainer broadcasts to workers
on other GPUs. Both move buckets of whole weights, of bounded size, that never touch the CPU. This runs in the trainer's
process, which imports vLLM for it.
"""

import math
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlqwen.errors import DeadlineExceeded, WeightSyncError
from rlqwen.rollout.ray_cluster import answer
from rlqwen.rollout.weight_sync import ExpectedWeights

BUCKET_BYTES = 256 * 1024**2
"""Bytes of weights that are packed together; a larger weight has a bucket of its own size."""
INIT, UPDATE = "init_weight_transfer_engine", "update_weights"


class PolicyWeights(WeightSource):
    """Give vLLM the policy's weights in the dtypes that the workers compute in."""

    def __init__(
        self, expected: ExpectedWeights, dtype: torch.dtype, metadata: Sequence[ParamMeta] | None = None
    ) -> None:
        """Give weights as `expected`; `metadata`: what another rank has read of them already."""
        self._expected = expected
        self._dtype = dtype
        self._metadata = None if metadata is None else list(metadata)
        self.stream: Iterable[tuple[str, torch.Tensor]] = ()
        """Names and tensors of this round; iterable more than once."""

    def metadata(self) -> list[ParamMeta]:
        """Return names, dtypes and shapes; the first call reads the stream, and compares it with the checkpoint."""
        if self._metadata is None:
            found = [
                ParamMeta(name, self._expected.sent_dtype(name, tensor, self._dtype), tuple(tensor.shape))
                for name, tensor in self.stream
            ]
            self._expected.check({meta.name: meta.shape for meta in found})
            self._metadata = found
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        stream = iter(self.stream)
        for meta in self.metadata():
            name, tensor = next(stream, ("nothing", torch.empty(0)))
            if (name, tuple(tensor.shape)) != (meta.name, meta.shape):
                raise WeightSyncError(
                    f"the policy's weights changed since the first sync: {name} {list(tensor.shape)} came where "
                    f"{meta.name} {list(meta.shape)} was"
                )
            yield name, tensor.detach().to(meta.dtype)
        for name, _ in stream:
            raise WeightSyncError(f"the policy's weights changed since the first sync: {name} is new")

    @property
    def sizes(self) -> list[int]:
        """Return the bytes of each weight."""
        return [math.prod(meta.shape) * meta.dtype.itemsize for meta in self.metadata()]


@dataclass(frozen=True)
class SendTask:
    """Tell other ranks how to send their weights by `ipc`; it pickles."""

    metadata: list[ParamMeta]
    bucket_bytes: int


def send_own_part(task: SendTask, weights: Iterable[tuple[str, torch.Tensor]], rank: int) -> None:
    """Fill this rank's buffers while the main rank leads the workers through the transfer; see `DeviceTransfer`."""
    source = PolicyWeights(ExpectedWeights(None), torch.float32, task.metadata)
    source.stream = weights
    info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=task.bucket_bytes)
    # Only the main rank calls the client.
    nobody = WorkersClient((), processes_per_engine=1, timeout_s=0.0)
    WeightTransferTrainerFactory.trainer_init(info, client=nobody, source=source).send_weights()


class WorkersClient:
    """Drive the worker's side of the protocol in several engines at once; see vLLM's VLLMWeightSyncClient."""

    def __init__(self, handles: Sequence[Any], *, processes_per_engine: int, timeout_s: float) -> None:
        """Talk to the Ray actors `handles`, each of which must answer within `timeout_s`."""
        self._handles = list(handles)
        self._processes_per_engine = processes_per_engine
        self._timeout_s = timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the engines; each takes the ranks of a group that follow those of the engine before it."""
        arguments = [dict(init_info) for _ in self._handles]
        for index, own in enumerate(arguments):
            if "rank_offset" in own:
                own["rank_offset"] += index * self._processes_per_engine
        self._call(INIT, [{"init_info": own} for own in arguments])

    def start_weight_update(self) -> None:
        """Begin a sync: workers drop what they sample, and prepare their layers."""
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Load a bucket, or all of them if the group carries the bytes."""
        self._call(UPDATE, [{"update_info": update_info}] * len(self._handles))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the sync."""
        self._call("finish_weight_update")

    def _call(self, phase: str, arguments: Sequence[dict[str, Any]] | None = None) -> None:
        """Run a phase in all engines; raise the first error, or DeadlineExceeded."""
        import ray

        own = arguments or [{}] * len(self._handles)
        pending = [handle.transfer.remote(phase, one) for handle, one in zip(self._handles, own, strict=True)]
        while pending:
            done, pending = ray.wait(pending, timeout=self._timeout_s)
            if not done:
                raise DeadlineExceeded(_late(phase, self._timeout_s))
            for reference in done:
                if isinstance(error := answer(reference), Exception):
                    raise error


class DeviceTransfer:
    """Send weights from GPU to GPU."""

    def __init__(
        self,
        backend: str,
        *,
        expected: ExpectedWeights,
        dtype: str,
        processes_per_engine: int,
        timeout_s: float,
    ) -> None:
        """Send by `ipc` or `nccl`; see WorkersClient. The connection is made at the first `send`."""
        self._backend = backend
        self._processes_per_engine = processes_per_engine
        self._timeout_s = timeout_s
        self._source = PolicyWeights(expected, getattr(torch, dtype))
        self._handles: list[Any] = []
        self._engine: Any = None

    def send(self, handles: Sequence[Any], weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Send `weights`, which may be read twice, to the engines of the actors `handles`; return the number of bytes.

        Raises WeightSyncError before any engine sees a weight if they are not those of the model, and DeadlineExceeded if
        an engine does not answer: a broadcast to one that died would wait for ever.
        """
        self._source.stream = weights
        try:
            task = SendTask(self._source.metadata(), self._bucket_bytes)
            within(self._timeout_s, lambda: self._send(list(handles), weights, task), self._backend)
        except BaseException:
            self._engine, self._handles = None, []  # what it holds, such as an NCCL group, is of no use any more
            raise
        finally:
            self._source.stream = ()
        return sum(self._source.sizes)

    def _send(self, handles: list[Any], weights: Iterable[tuple[str, torch.Tensor]], task: SendTask) -> None:
        if handles != self._handles:
            self.close()
            client = WorkersClient(handles, processes_per_engine=self._processes_per_engine, timeout_s=self._timeout_s)
            self._engine = WeightTransferTrainerFactory.trainer_init(
                self._init_info(len(handles)), client=client, source=self._source
            )
            self._handles = handles
        by_all = getattr(weights, "send_by_all_ranks", None)
        if by_all is None or self._backend != "ipc":
            self._engine.send_weights()
        else:
            by_all(task, self._send_stream)

    def _send_stream(self, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._source.stream = stream
        self._engine.send_weights()

    @property
    def _bucket_bytes(self) -> int:
        return max(BUCKET_BYTES, *self._source.sizes)

    def _init_info(self, num_engines: int) -> IPCTrainerInitInfo | NCCLTrainerInitInfo:
        size = self._bucket_bytes
        if self._backend == "ipc":
            return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=size)
        import ray

        return NCCLTrainerInitInfo(
            rank=0,
            master_address=ray.util.get_node_ip_address(),
            master_port=_free_port(),
            world_size=1 + num_engines * self._processes_per_engine,
            packed_buffer_size_bytes=size,
        )

    def close(self) -> None:
        """Leave the group of the workers, if there is one."""
        if self._engine is not None:
            self._engine.shutdown()
        self._engine, self._handles = None, []


def within(seconds: float, work: Callable[[], None], what: str) -> None:
    """Run `work`, which may block in a CUDA call, in a thread of its own; raise DeadlineExceeded if it takes too long."""
    errors: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            work()
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="weight-transfer", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DeadlineExceeded(_late(what, seconds))
    if errors:
        raise errors[0]


def _late(what: str, seconds: float) -> str:
    return f"the weight transfer ({what}) took more than rollout.sync_timeout = {seconds:g} s"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
