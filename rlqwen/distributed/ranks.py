"""Let the processes that train together communicate.

Every rank holds every row and every group of completions (tokens are small), and all ranks divide them by the same
rule. So counts over the whole update, by which losses are divided, need no communication, and every rank knows how many
forwards the others will make: a rank with fewer makes idle ones, so that none waits forever.
"""

import atexit
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlqwen.config import ParallelConfig
from rlqwen.errors import MainRankFailed
from rlqwen.packing.sequence_parallel import SequenceGroup

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""Timeout of waits for work of the main rank. If that rank dies, its connections close, and the wait ends at once."""
_LEAVE_S = 5.0
"""Seconds to close the connections at exit; a call that another rank will never answer may keep them open."""


def is_loss_of_rank(error: BaseException) -> bool:
    """Return whether the error only reports that another rank is gone, or has failed."""
    if isinstance(error, MainRankFailed):
        return True
    while error is not None:
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False


class Ranks:
    """Connect this process with the others of the run; one process needs no launcher and does not communicate.

    Messages between ranks go over gloo, through CPU memory, so that they never mix with the traffic of gradients.
    """

    def __init__(self, config: ParallelConfig | None = None) -> None:
        """Join the processes that torchrun (or `rlqwen run --nproc-per-node`) has started, if any.

        Raises ConfigError if they cannot be divided into the groups that `config` asks for.
        """
        config = config or ParallelConfig()
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.ranks_per_row = config.ranks_per_row
        """Number of neighboring ranks that see the same rows; values of their share are taken from the first."""
        config.check_ranks(self.world_size)
        self._group: Any = None
        self._patient_group: Any = None
        if self.world_size > 1:
            timeout = timedelta(seconds=config.timeout)
            if not dist.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                dist.init_process_group(backend, timeout=timeout)
            _leave_at_exit()
            self._group = dist.new_group(backend="gloo", timeout=timeout)
            self._patient_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.sequence = SequenceGroup(self._neighbors() if config.sequence_parallel_size > 1 else None)
        """The ranks that forward a row together, one slice each."""
        self.tensor_group: Any = self._neighbors() if config.autotp_size > 1 else None
        """The ranks that hold a model together, one shard of each layer each."""
        self.gradient_group: Any = self._counterparts() if config.autotp_size > 1 else None
        """The ranks whose gradients add up: those with the same shards. None: all."""

    @property
    def group(self) -> Any:
        """Return a process group of all ranks whose messages go through CPU memory; None if there is one rank."""
        return self._group

    @property
    def is_main(self) -> bool:
        """Return whether this is the rank that samples, logs and writes for all."""
        return self.rank == 0

    def _neighbors(self) -> Any:
        """Return the group of the ranks that see the same rows as this one."""
        groups = [
            dist.new_group(list(range(first, first + self.ranks_per_row)))
            for first in range(0, self.world_size, self.ranks_per_row)
        ]
        return groups[self.data_rank]

    def _counterparts(self) -> Any:
        """Return the group of the ranks that have the same position among their neighbors as this one."""
        groups = [
            dist.new_group(list(range(place, self.world_size, self.ranks_per_row)))
            for place in range(self.ranks_per_row)
        ]
        return groups[self.rank % self.ranks_per_row]

    @property
    def data_size(self) -> int:
        """Return the number of shares into which the rows are divided."""
        return self.world_size // self.ranks_per_row

    @property
    def data_rank(self) -> int:
        """Return the index of this rank's share."""
        return self.rank // self.ranks_per_row

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's share of items that all ranks hold: every `data_size`-th, so that sizes differ by at most 1."""
        return self.shares(items)[self.data_rank]

    def shares(self, items: Sequence[T]) -> list[Sequence[T]]:
        """Return the shares of all ranks."""
        return [items[share :: self.data_size] for share in range(self.data_size)]

    def from_main(self, value: T, *, patient: bool = False) -> T:
        """Return on every rank the value of the main rank; it must pickle.

        `patient`: wait as long as the main rank is alive, because its work has its own deadlines.
        """
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._patient_group if patient else self._group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank; they must pickle."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self._group)
        return box

    def gather_shares(self, value: T) -> list[T]:
        """Return one value per share of the rows, by share; ranks that see the same rows have the same value."""
        return self.gather(value)[:: self.ranks_per_row]

    def concatenate(self, tensor: Tensor) -> Tensor:
        """Return the rows of all shares, in order, without gradient; shares may have different sizes."""
        if self.world_size == 1:
            return tensor
        return torch.cat(self.gather_shares(tensor.detach().cpu())).to(tensor.device)

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the sum of each value over the shares of the rows; a share may lack some."""
        total: dict[str, float] = {}
        for part in self.gather_shares(dict(values)):
            for key, value in part.items():
                total[key] = total.get(key, 0.0) + value
        return total

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self._group)


@functools.cache
def _leave_at_exit() -> None:
    """End the threads of the process groups before the interpreter ends.

    A thread that then still drops the tensors of its last call needs the interpreter, does not get it, and aborts the
    process: a finished run would end with SIGABRT.
    """
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
        thread.start()
        thread.join(_LEAVE_S)
