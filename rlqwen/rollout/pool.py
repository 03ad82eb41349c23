"""Hold a pool of workers under Ray: send them weights, and replace workers that die or get stuck.

A worker serves only while it holds the pool's version of the weights. A replacement starts from the model's folder and
is sent that version, canary included, before it gets a group; groups of the worker that it replaces are sampled again,
from the same seeds.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.errors import DeadlineExceeded, RolloutError, WeightSyncError, WorkerDied
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.actors import START_KEY, SYNC_KEY, ActorHandle, ActorHandles
from rlqwen.rollout.dispatch import GENERATE_KEY, GroupDispatch, check_lengths
from rlqwen.rollout.engine_placement import Placement
from rlqwen.rollout.sampled_groups import GroupReader
from rlqwen.rollout.turns import WAIT_S, Turns
from rlqwen.rollout.weight_delivery import delivery_of
from rlqwen.rollout.weight_sync import (
    ExpectedWeights,
    LoadReport,
    WeightBundle,
    describe_reports,
    explain_gap,
    sent_bytes,
)
from rlqwen.rollout.worker_protocol import EngineSettings, files_of, transfer_of
from rlqwen.types import Canary, Group, GroupRequest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_PURPOSE = {START_KEY: "to start", GENERATE_KEY: "for one group", SYNC_KEY: "to acknowledge weights"}
PROGRESS_S = 10.0
"""Seconds between two progress lines while the workers start."""
CANCEL_WAIT = 0.5
"""Seconds after which a wait checks whether it was cancelled."""


class RolloutPool:
    """A trainer's engine in Ray workers; see RolloutEngine."""

    def __init__(
        self,
        placement: Placement,
        *,
        engine: str,
        model_path: str,
        tokenizer: "PreTrainedTokenizerBase",
        dtype: str,
        max_model_length: int,
        seed: int,
        lora_rank: int | None = None,
        reads_text: bool = False,
        reserved_bytes: int = 0,
    ) -> None:
        self.config = config = placement.config
        self.version = 0
        self._reader = GroupReader(tokenizer)
        self._delivery = delivery_of(placement, ExpectedWeights(model_path if lora_rank is None else None), dtype)
        self.is_asleep = False
        """Whether the workers hold no weights until the next `load_weights`."""
        self._bundle: WeightBundle | None = None
        self._failure: str | None = None
        self._reports: list[LoadReport] = []
        self._turns = Turns()
        self._call = 0
        stored = sent_bytes(model_path, dtype, lora_rank) if transfer_of(config) == "object_store" else 0
        joined = cluster.connect(config, sent_bytes=stored, gpus=placement.gpus)
        self._settings = EngineSettings.of(
            placement,
            engine=engine,
            model_path=str(Path(model_path).absolute()),
            dtype=dtype,
            max_model_length=max_model_length,
            seed=seed,
            num_threads=joined.resources.threads_for(Path(model_path)),
            lora_rank=lora_rank,
            tokenizer_files=files_of(tokenizer) if reads_text else None,
            reserved_bytes=reserved_bytes,
        )
        self._actors = ActorHandles(config, self._settings, joined)
        self._dispatch = GroupDispatch(config, self._actors)

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        """See RolloutEngine. Raises WorkerDied once workers have died more than `max_restarts` times."""
        if self.is_asleep:
            raise RolloutError("no worker may serve, because they sleep without weights: load_weights wakes them")
        check_lengths(requests, self._settings.max_model_length)
        with self._turns.sampling():
            self._dispatch.drop()
            self._call += 1
            call, num_left = self._call, len(requests)
            self._dispatch.add(requests)
        while num_left:
            with self._turns.sampling():
                groups = self._advance(call)
            for group in groups:
                num_left -= 1
                yield group
                if self._call != call:
                    break
        if self._settings.sleep_level:
            self._sleep()

    def _advance(self, call: int) -> list[Group]:
        """Hand out groups, and return those that are ready, perhaps none."""
        if self._failure is not None:
            raise RolloutError(f"no worker may serve, for the last weight sync failed: {self._failure}")
        if self._call != call:
            raise RolloutError("this iterator was dropped by a later generate(), load_weights(), cancel() or close()")
        self._dispatch.hand_out(self._bundle)
        groups = []
        for reference in self._ready():
            if reference in self._dispatch.in_flight:
                groups += self._collect(reference)
            elif not self._dispatch.progress.receive(reference):
                self._acknowledge(reference)
        self._replace_late()
        return groups

    def load_weights(
        self, version: int, weights: "Iterable[tuple[str, torch.Tensor]]", canary: Canary | None
    ) -> dict[str, float]:
        """See RolloutEngine. With `rollout.in_flight_updates` groups in flight are kept, also those of another thread's
        `generate`, which goes on after this."""
        keeps = self.config.in_flight_updates
        with self._turns.sending():
            if not keeps:
                self._dispatch.drop()
                self._call += 1
            started, num_kept = time.monotonic(), sum(actor.num_running for actor in self._actors)
            metrics = self._load(version, weights, canary)
            self._dispatch.extend_deadlines(time.monotonic() - started)
        return metrics | ({"sync/kept_completions": float(num_kept)} if keeps else {})

    def _load(
        self, version: int, weights: "Iterable[tuple[str, torch.Tensor]]", canary: Canary | None
    ) -> dict[str, float]:
        self._failure, self.is_asleep = "it is not finished", False
        try:
            self._bundle = None  # so that the object store, which lets go of it, need not hold two versions
            for actor in self._actors:
                actor.bundle = None
            started = time.monotonic()
            if self._delivery.needs_workers:
                self.wait_until_ready()
            bundle = self._delivery.publish(version, weights, canary, [actor.handle for actor in self._actors])
            sent_s = 0.0 if bundle.is_stored else time.monotonic() - started
            self._bundle, self.version, self._reports = bundle, version, []
            for actor in [actor for actor in self._actors if actor.waiting is None]:
                actor.send(self._bundle, timeout_s=self.config.sync_timeout)
            self.wait_until_ready()
        except BaseException as error:
            self._failure = str(error) or type(error).__name__
            raise
        self._failure = None
        metrics = describe_reports(self._reports, sent_s=sent_s)
        return metrics | {"sync/bytes": float(bundle.num_bytes), "rollout/restarts": float(self.num_restarts)}

    def wait_until_ready(self, announce: Callable[[str], None] | None = None) -> None:
        """Wait until every worker is up and holds the pool's weights; `announce` is told the progress."""
        started = said = time.monotonic()
        while any(actor.waiting is not None for actor in self._actors):
            for reference in self._ready(groups=False):
                self._acknowledge(reference)
            self._replace_late(groups=False)
            num_up, now = sum(actor.waiting is None for actor in self._actors), time.monotonic()
            if announce and (num_up == len(self._actors) or now - said > PROGRESS_S):
                announce(f"rollout workers: {num_up} of {len(self._actors)} up after {now - started:.0f} s")
                said = now

    def _sleep(self) -> None:
        """Have the workers free their GPUs' memory, and wait until they have."""
        self.is_asleep = True
        for actor in [actor for actor in self._actors if actor.waiting is None]:
            actor.sleep(timeout_s=self.config.sync_timeout)
        self.wait_until_ready()

    def cancel(self) -> None:
        """See RolloutEngine."""
        self._call += 1

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        self._call += 1
        self._dispatch.forget()
        self._actors.end()

    @property
    def num_restarts(self) -> int:
        """Return how many workers have failed."""
        return self._actors.num_restarts

    def process_ids(self) -> list[int]:
        """Return the process ids of the workers, in order."""
        import ray

        return [ray.get(actor.process, timeout=self.config.start_timeout) for actor in self._actors]

    def _ready(self, *, groups: bool = True) -> list[Any]:
        """Wait for an answer, and return the references that have one: acknowledgements, and groups and reports if asked.

        Returns none if a deadline passes first, or after the time in which a `cancel` must be noticed.
        """
        waiting = [actor for actor in self._actors if actor.waiting is not None]
        flights = self._dispatch.in_flight if groups else {}
        reports = self._dispatch.progress if flights else ()
        references = [*flights, *(actor.waiting for actor in waiting), *reports]
        deadline = min([flight.deadline for flight in flights.values()] + [actor.deadline for actor in waiting])
        limit = WAIT_S if self.config.in_flight_updates else CANCEL_WAIT
        return cluster.wait(references, timeout_s=min(max(0.0, deadline - time.monotonic()), limit))

    def _collect(self, reference: Any) -> list[Group]:
        """Return the group behind `reference`; none if its worker died, which makes the group pending again."""
        actor = self._dispatch.in_flight[reference].actor
        try:
            return [self._reader.group(*self._dispatch.collect(reference))]
        except WorkerDied as error:
            self._replace(actor, error)
            return []

    def _acknowledge(self, reference: Any) -> None:
        """Receive a worker's acknowledgement, and send it the weights that it lacks."""
        actor = next((actor for actor in self._actors if actor.waiting is reference), None)
        if actor is None:
            return
        answer = cluster.answer(reference)
        if isinstance(answer, Exception):
            if actor.deadline_key == START_KEY and not isinstance(answer, WorkerDied):
                # Another process would meet the same exception.
                raise RolloutError(f"{actor} could not start its engine: {answer}")
            self._replace(actor, answer)
            return
        actor.waiting = None
        if self.is_asleep:
            if actor.deadline_key == START_KEY:  # it replaced one that slept
                actor.sleep(timeout_s=self.config.sync_timeout)
            return
        if actor.bundle is not self._bundle:
            if self._bundle is not None:
                self._delivery.resend(actor.handle)
            actor.send(self._bundle, timeout_s=self.config.sync_timeout)
        elif isinstance(answer, LoadReport):
            self._check_canary(actor, answer)
            self._reports.append(answer)

    def _check_canary(self, actor: ActorHandle, report: LoadReport) -> None:
        if self._bundle is not None and not self._bundle.accepts(report.canary_gap):
            raise WeightSyncError(explain_gap(str(actor), report, self._bundle))

    def _replace_late(self, *, groups: bool = True) -> None:
        """Replace the workers that missed a deadline; `groups`: one for a group, too."""
        now = time.monotonic()
        late = dict.fromkeys(self._dispatch.late(now) if groups else (), GENERATE_KEY)
        late |= {
            actor: actor.deadline_key for actor in self._actors if actor.waiting is not None and actor.deadline <= now
        }
        for actor, key in late.items():
            limit = getattr(self.config, key.removeprefix("rollout."))
            error = DeadlineExceeded(f"it took more than {key} = {limit:g} s {_PURPOSE[key]}")
            self._replace(actor, error)

    def _replace(self, actor: ActorHandle, error: Exception) -> None:
        """Kill a worker and start another; its groups are pending again, before the others."""
        self._dispatch.take_back(actor)
        self._actors.replace(actor, error)
