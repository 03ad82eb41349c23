"""Hold a pool of workers under Ray: hands out groups as workers have room, replaces workers that die or get stuck.

A worker serves only while it holds the pool's version of the weights. A replacement starts from the model's folder and
is sent that version, canary included, before it gets a group; groups of the worker that it replaces are sampled again,
from the same seeds.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.data.control_tokens import CompletionReader
from rlqwen.errors import ConfigError, DeadlineExceeded, RolloutError, WeightSyncError, WorkerDied
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.actors import START_KEY, SYNC_KEY, ActorHandle, ActorHandles, InFlightRequest
from rlqwen.rollout.engine_placement import Placement
from rlqwen.rollout.progress_reports import ProgressReports
from rlqwen.rollout.weight_delivery import delivery_of
from rlqwen.rollout.weight_sync import ExpectedWeights, LoadReport, WeightBundle, explain_gap, sent_bytes
from rlqwen.rollout.worker_protocol import EngineSettings, GroupJob, Sampled, Share, files_of, transfer_of
from rlqwen.types import Canary, Completion, Group, GroupRequest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GENERATE_KEY = "rollout.generate_timeout"
_PURPOSE = {START_KEY: "to start", GENERATE_KEY: "for one group", SYNC_KEY: "to acknowledge weights"}
SMALL_MODEL_BYTES = 32 * 1024**2
"""Below this size a second thread gained nothing (0.8 M parameters: 0.31 s per rollout against 0.27 s), and cost tenfold
while another process kept a core busy."""
PROGRESS_S = 10.0
"""Seconds between two progress lines while the workers start."""
CANCEL_WAIT = 0.5
"""Seconds after which a wait checks whether it was cancelled."""
OVERCOMMIT = 1.5
"""Completions handed to a worker, as a multiple of what it decodes at a time: when a short completion ends, its place is
filled from the worker's own queue, without waiting for the pool."""
REPORTS = 4
"""Reports of a worker while it decodes as many completions as at a time: room is known although long completions keep
their groups from coming back."""
MAX_SHARE = 512
"""Groups per share: each is a call that waits in its actor, and Ray allows 1000 of these."""


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
        self.num_restarts = 0
        self._reader = CompletionReader(tokenizer)
        self._delivery = delivery_of(placement, ExpectedWeights(model_path if lora_rank is None else None), dtype)
        self.is_asleep = False
        """Whether the workers hold no weights until the next `load_weights`."""
        self._bundle: WeightBundle | None = None
        self._failure: str | None = None
        self._reports: list[LoadReport] = []
        self._in_flight: dict[Any, InFlightRequest] = {}
        self._progress = ProgressReports()
        self._call = self._num_shares = 0
        weight_bytes = sum(path.stat().st_size for path in Path(model_path).glob("*.safetensors"))
        stored = sent_bytes(model_path, dtype, lora_rank) if transfer_of(config) == "object_store" else 0
        joined = cluster.connect(config, sent_bytes=stored, gpus=placement.gpus)
        self._settings = EngineSettings.of(
            placement,
            engine=engine,
            model_path=str(Path(model_path).absolute()),
            dtype=dtype,
            max_model_length=max_model_length,
            seed=seed,
            num_threads=joined.resources.num_threads if weight_bytes > SMALL_MODEL_BYTES else 1,
            lora_rank=lora_rank,
            tokenizer_files=files_of(tokenizer) if reads_text else None,
            reserved_bytes=reserved_bytes,
        )
        self._actors = ActorHandles(config, self._settings, joined)

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        """See RolloutEngine. Raises WorkerDied once workers have died more than `max_restarts` times."""
        if self._failure is not None:
            raise RolloutError(f"no worker may serve, for the last weight sync failed: {self._failure}")
        if self.is_asleep:
            raise RolloutError("no worker may serve, because they sleep without weights: load_weights wakes them")
        for request in requests:
            self._check_length(request)
        self._drop_in_flight()
        self._call += 1
        call, pending = self._call, deque(requests)
        num_left = len(pending)
        while num_left:
            if self._call != call:
                raise RolloutError(
                    "this iterator was dropped by a later generate(), load_weights(), cancel() or close()"
                )
            self._hand_out(pending)
            for reference in self._ready():
                if reference not in self._in_flight:
                    if not self._progress.receive(reference):
                        self._acknowledge(reference, pending)
                    continue
                group = self._collect(reference, pending)
                if group is not None:
                    num_left -= 1
                    yield group
                    if self._call != call:
                        break
            self._replace_late(pending)
        if self._settings.sleep_level:
            self._sleep()

    def load_weights(
        self, version: int, weights: "Iterable[tuple[str, torch.Tensor]]", canary: Canary | None
    ) -> dict[str, float]:
        """See RolloutEngine."""
        self._drop_in_flight()
        self._call += 1
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
        gaps = [report.canary_gap for report in self._reports if report.canary_gap is not None]
        return {
            **({"sync/canary_gap": max(gaps)} if gaps else {}),
            "sync/seconds": sent_s + max(report.seconds for report in self._reports),
            "sync/bytes": float(bundle.num_bytes),
            "sync/rebuilt_engines": float(sum(report.rebuilt for report in self._reports)),
            "rollout/restarts": float(self.num_restarts),
        }

    def wait_until_ready(self, announce: Callable[[str], None] | None = None) -> None:
        """Wait until every worker is up and holds the pool's weights; `announce` is told the progress."""
        nothing: deque[GroupRequest] = deque()
        started = said = time.monotonic()
        while any(actor.waiting is not None for actor in self._actors):
            for reference in self._ready():
                self._acknowledge(reference, nothing)
            self._replace_late(nothing)
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
        self._in_flight.clear()
        self._actors.end()

    def process_ids(self) -> list[int]:
        """Return the process ids of the workers, in order."""
        import ray

        return [ray.get(actor.process, timeout=self.config.start_timeout) for actor in self._actors]

    def _check_length(self, request: GroupRequest) -> None:
        length, limit = len(request.prompt.token_ids), self._settings.max_model_length
        if length >= limit:
            raise ConfigError(
                f"prompt {request.prompt.index} has {length} tokens, which leaves no room for a completion in the "
                f"engines' context of {limit}; raise rollout.max_model_length or set train.max_prompt_length"
            )

    def _hand_out(self, pending: deque[GroupRequest]) -> None:
        """Give the next groups to the workers that have the least to do, while they have room.

        If rollouts are to repeat to the bit, give each worker its share once all are idle.
        """
        if self.config.deterministic or self.config.worker_count == 1:
            self._hand_out_shares(pending)
            return
        room = OVERCOMMIT * self.config.max_num_seqs
        settled = [actor for actor in self._actors if actor.waiting is None and actor.bundle is self._bundle]
        while pending and settled:
            actor = min(settled, key=lambda actor: actor.num_running)
            count = len(pending[0].seeds)
            if actor.num_running and actor.num_running + count > room:
                break
            self._hand(actor, pending.popleft())
        if pending:
            self._progress.ask(settled, max(1, self.config.max_num_seqs // REPORTS))

    def _hand_out_shares(self, pending: deque[GroupRequest]) -> None:
        count = len(self._actors)
        settled = all(actor.waiting is None and actor.bundle is self._bundle for actor in self._actors)
        if self._in_flight or not settled:
            return
        block = [pending.popleft() for _ in range(min(len(pending), MAX_SHARE * count))]
        for actor in self._actors:
            own = block[actor.index :: count]
            self._num_shares += 1
            share = Share(self._num_shares, len(own))
            for place, request in enumerate(own):
                self._hand(actor, request, share, place)

    def _hand(self, actor: ActorHandle, request: GroupRequest, share: Share | None = None, place: int = 0) -> None:
        job = GroupJob(list(request.prompt.token_ids), request.seeds, request.sampling, share, place)
        deadline = time.monotonic() + self.config.generate_timeout
        self._in_flight[actor.handle.sample.remote(job)] = InFlightRequest(actor, request, deadline)
        actor.num_handed += len(request.seeds)

    def _ready(self) -> list[Any]:
        """Wait for an answer, and return the references that have one: groups and acknowledgements.

        Returns none if a deadline passes first, or after the time in which a `cancel` must be noticed.
        """
        waiting = [actor for actor in self._actors if actor.waiting is not None]
        reports = self._progress if self._in_flight else ()
        references = [*self._in_flight, *(actor.waiting for actor in waiting), *reports]
        deadline = min([flight.deadline for flight in self._in_flight.values()] + [actor.deadline for actor in waiting])
        return cluster.wait(references, timeout_s=min(max(0.0, deadline - time.monotonic()), CANCEL_WAIT))

    def _collect(self, reference: Any, pending: deque[GroupRequest]) -> Group | None:
        """Return the group behind `reference`; None if its worker died, which puts the group back into `pending`."""
        flight = self._in_flight[reference]
        answer = cluster.answer(reference)
        if isinstance(answer, WorkerDied):
            self._replace(flight.actor, answer, pending)
            return None
        del self._in_flight[reference]
        flight.actor.num_returned += len(flight.request.seeds)
        for other in self._in_flight.values():
            if other.actor is flight.actor:
                other.deadline = time.monotonic() + self.config.generate_timeout
        if isinstance(answer, Exception):
            raise answer
        completions_G, version, prompt_experts = answer
        completions = self._completions(completions_G)
        return Group(flight.request.prompt, completions, version, prompt_experts=prompt_experts)

    def _completions(self, sampled_G: list[Sampled]) -> list[Completion]:
        texts_G = self._reader.texts([sampled[0] for sampled in sampled_G])
        return [
            Completion(token_ids, logprobs, reason, text, experts)
            for (token_ids, logprobs, reason, experts), text in zip(sampled_G, texts_G, strict=True)
        ]

    def _acknowledge(self, reference: Any, pending: deque[GroupRequest]) -> None:
        """Receive a worker's acknowledgement, and send it the weights that it lacks."""
        actor = next((actor for actor in self._actors if actor.waiting is reference), None)
        if actor is None:
            return
        answer = cluster.answer(reference)
        if isinstance(answer, Exception):
            if actor.deadline_key == START_KEY and not isinstance(answer, WorkerDied):
                # Another process would meet the same exception.
                raise RolloutError(f"{actor} could not start its engine: {answer}")
            self._replace(actor, answer, pending)
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

    def _replace_late(self, pending: deque[GroupRequest]) -> None:
        """Replace the workers that missed a deadline."""
        now = time.monotonic()
        late = {flight.actor: GENERATE_KEY for flight in self._in_flight.values() if flight.deadline <= now}
        late |= {
            actor: actor.deadline_key for actor in self._actors if actor.waiting is not None and actor.deadline <= now
        }
        for actor, key in late.items():
            limit = getattr(self.config, key.removeprefix("rollout."))
            error = DeadlineExceeded(f"it took more than {key} = {limit:g} s {_PURPOSE[key]}")
            self._replace(actor, error, pending)

    def _replace(self, actor: ActorHandle, error: Exception, pending: deque[GroupRequest]) -> None:
        """Kill a worker and start another; its groups go back to the front of `pending`."""
        import ray

        stderr_tail = f"{actor}: {error}{self._actors.stderr_tail(actor)}"
        ray.kill(actor.handle)
        lost = [reference for reference, flight in self._in_flight.items() if flight.actor is actor]
        pending.extendleft([self._in_flight.pop(reference).request for reference in reversed(lost)])
        self.num_restarts += 1
        if self.num_restarts > self.config.max_restarts:
            kind = type(error) if isinstance(error, DeadlineExceeded) else WorkerDied
            raise kind(
                f"rollout workers failed {self.num_restarts} times, and rollout.max_restarts is "
                f"{self.config.max_restarts}. The last: {stderr_tail}"
            )
        self._actors.replace(actor)

    def _drop_in_flight(self) -> None:
        """Drop every group in flight, and tell its worker."""
        for actor in {flight.actor for flight in self._in_flight.values()}:
            actor.handle.abort.remote()
            actor.progress = None  # the worker ends it
        for actor in self._actors:
            actor.forget_groups()
        self._in_flight.clear()
