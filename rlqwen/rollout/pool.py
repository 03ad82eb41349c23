"""Hold a pool of workers under Ray: hands out groups as workers have room, replaces workers that die or get stuck.

A worker serves only while it holds the pool's version of the weights. A replacement starts from the model's folder and
is sent that version, canary included, before it gets a group; groups of the worker before it are drawn again, from the
same seeds.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.config import RolloutConfig
from rlqwen.data.control_tokens import CompletionReader
from rlqwen.errors import ConfigError, DeadlineExceeded, RolloutError, WeightSyncError, WorkerDied
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.actors import START_KEY, SYNC_KEY, Slot, Slots
from rlqwen.rollout.weight_sync import ExpectedWeights, LoadReport, WeightBundle, explain_gap, publish, sent_bytes
from rlqwen.rollout.worker_protocol import EngineSettings, GroupJob, Sampled, Share, files_of
from rlqwen.types import Canary, Completion, Group, GroupRequest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GENERATE_KEY = "rollout.generate_timeout"
_PURPOSE = {START_KEY: "to start", GENERATE_KEY: "for one group", SYNC_KEY: "to acknowledge weights"}
SMALL_MODEL_BYTES = 32 * 1024**2
"""Below this, a second thread gained nothing (0.8 M parameters: 0.31 s a rollout against 0.27 s), and cost tenfold
where another process kept a core busy."""
PROGRESS_S = 10.0
"""Between two lines on how far the start of the workers is."""
CANCEL_WAIT = 0.5
"""Seconds after which a wait looks whether it was cancelled."""
OVERCOMMIT = 1.5
"""Completions handed to a worker, as a multiple of what it decodes at a time: a short completion's place is filled
from the worker's own queue, without waiting for the rest of its group."""
MAX_SHARE = 512
"""Groups in a share: each is a call that waits in its actor, which Ray lets 1000 do."""


@dataclass
class _Flight:
    """A group handed to a worker."""

    slot: Slot
    request: GroupRequest
    deadline: float


class RolloutPool:
    """A trainer's engine in Ray workers; see RolloutEngine."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        engine: str,
        model_path: str,
        tokenizer: "PreTrainedTokenizerBase",
        dtype: str,
        max_model_length: int,
        seed: int,
        lora_rank: int | None = None,
        reads_text: bool = False,
    ) -> None:
        self.config = config
        self.version = 0
        self.num_restarts = 0
        self._reader = CompletionReader(tokenizer)
        self._dtype = dtype
        self._expected = ExpectedWeights(model_path if lora_rank is None else None)
        self._bundle: WeightBundle | None = None
        self._failure: str | None = None
        self._reports: list[LoadReport] = []
        self._flights: dict[Any, _Flight] = {}
        self._call = self._num_shares = 0
        weight_bytes = sum(path.stat().st_size for path in Path(model_path).glob("*.safetensors"))
        joined = cluster.connect(config, sent_bytes=sent_bytes(model_path, dtype, lora_rank))
        self._settings = EngineSettings(
            engine=engine,
            model_path=str(Path(model_path).absolute()),
            dtype=dtype,
            max_model_length=max_model_length,
            max_num_seqs=config.max_num_seqs,
            seed=seed,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=config.enforce_eager,
            kv_cache_gib=config.kv_cache_gib,
            num_threads=joined.resources.num_threads if weight_bytes > SMALL_MODEL_BYTES else 1,
            lora_rank=lora_rank,
            tokenizer_files=files_of(tokenizer) if reads_text else None,
            returns_experts=config.routing_replay,
            arguments=config.engine_args,
        )
        self._slots = Slots(config, self._settings, joined)

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        """See RolloutEngine. Raises WorkerDied once workers have died more than `max_restarts` times."""
        if self._failure is not None:
            raise RolloutError(f"no worker may serve, for the last weight sync failed: {self._failure}")
        for request in requests:
            self._check_length(request)
        self._drop_flights()
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
                if reference not in self._flights:
                    self._settle(reference, pending)
                    continue
                group = self._collect(reference, pending)
                if group is not None:
                    num_left -= 1
                    yield group
                    if self._call != call:
                        break
            self._replace_late(pending)

    def load_weights(
        self, version: int, weights: "Iterable[tuple[str, torch.Tensor]]", canary: Canary | None
    ) -> dict[str, float]:
        """See RolloutEngine."""
        self._drop_flights()
        self._call += 1
        self._failure = "it is not finished"
        try:
            self._bundle = None  # so that the object store, which lets go of it, need not hold two versions
            for slot in self._slots:
                slot.bundle = None
            bundle = publish(version, weights, canary, dtype=self._dtype, expected=self._expected, put=cluster.put)
            self._bundle, self.version, self._reports = bundle, version, []
            for slot in self._slots:
                if slot.waiting is None:
                    slot.send(self._bundle, timeout_s=self.config.sync_timeout)
            self.wait_until_ready()
        except BaseException as error:
            self._failure = str(error) or type(error).__name__
            raise
        self._failure = None
        gaps = [report.canary_gap for report in self._reports if report.canary_gap is not None]
        return {
            **({"sync/canary_gap": max(gaps)} if gaps else {}),
            "sync/seconds": max(report.seconds for report in self._reports),
            "sync/bytes": float(bundle.num_bytes),
            "sync/rebuilt_engines": float(sum(report.rebuilt for report in self._reports)),
            "rollout/restarts": float(self.num_restarts),
        }

    def wait_until_ready(self, announce: Callable[[str], None] | None = None) -> None:
        """Wait until every worker is up and holds the pool's weights; `announce` is told the progress."""
        nothing: deque[GroupRequest] = deque()
        started = said = time.monotonic()
        while any(slot.waiting is not None for slot in self._slots):
            for reference in self._ready():
                self._settle(reference, nothing)
            self._replace_late(nothing)
            num_up, now = sum(slot.waiting is None for slot in self._slots), time.monotonic()
            if announce and (num_up == len(self._slots) or now - said > PROGRESS_S):
                announce(f"rollout workers: {num_up} of {len(self._slots)} up after {now - started:.0f} s")
                said = now

    def cancel(self) -> None:
        """See RolloutEngine."""
        self._call += 1

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        self._call += 1
        self._flights.clear()
        self._slots.end()

    def process_ids(self) -> list[int]:
        """Process ids of the workers, by slot."""
        import ray

        return [ray.get(slot.process, timeout=self.config.start_timeout) for slot in self._slots]

    def _check_length(self, request: GroupRequest) -> None:
        length, limit = len(request.prompt.token_ids), self._settings.max_model_length
        if length >= limit:
            raise ConfigError(
                f"prompt {request.prompt.index} has {length} tokens, which leaves no room for a completion in the "
                f"engines' context of {limit}; raise rollout.max_model_length or set train.max_prompt_length"
            )

    def _hand_out(self, pending: deque[GroupRequest]) -> None:
        """Give the next groups to the workers with the least to do, while they have room; or where draws repeat to the
        bit, to each worker its share, once all are idle."""
        if self.config.deterministic or self.config.num_workers == 1:
            self._hand_out_shares(pending)
            return
        room = OVERCOMMIT * self.config.max_num_seqs
        settled = [slot for slot in self._slots if slot.waiting is None and slot.bundle is self._bundle]
        while pending and settled:
            slot = min(settled, key=lambda slot: slot.num_running)
            count = len(pending[0].seeds)
            if slot.num_running and slot.num_running + count > room:
                return
            self._hand(slot, pending.popleft())

    def _hand_out_shares(self, pending: deque[GroupRequest]) -> None:
        count = len(self._slots)
        settled = all(slot.waiting is None and slot.bundle is self._bundle for slot in self._slots)
        if self._flights or not settled:
            return
        block = [pending.popleft() for _ in range(min(len(pending), MAX_SHARE * count))]
        for slot in self._slots:
            own = block[slot.index :: count]
            self._num_shares += 1
            share = Share(self._num_shares, len(own))
            for place, request in enumerate(own):
                self._hand(slot, request, share, place)

    def _hand(self, slot: Slot, request: GroupRequest, share: Share | None = None, place: int = 0) -> None:
        job = GroupJob(list(request.prompt.token_ids), request.seeds, request.sampling, share, place)
        deadline = time.monotonic() + self.config.generate_timeout
        self._flights[slot.actor.sample.remote(job)] = _Flight(slot, request, deadline)
        slot.num_running += len(request.seeds)

    def _ready(self) -> list[Any]:
        """References that have an answer, groups and acknowledgements; waits for the first, at most to a deadline and
        for as long as it may take to notice a `cancel`."""
        import ray

        waiting = [slot for slot in self._slots if slot.waiting is not None]
        references = [*self._flights, *(slot.waiting for slot in waiting)]
        deadline = min([flight.deadline for flight in self._flights.values()] + [slot.deadline for slot in waiting])
        ready, rest = ray.wait(
            references, timeout=min(max(0.0, deadline - time.monotonic()), CANCEL_WAIT), fetch_local=True
        )
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return ready

    def _collect(self, reference: Any, pending: deque[GroupRequest]) -> Group | None:
        """The group behind `reference`; None if its worker died, which puts the group back into `pending`."""
        flight = self._flights[reference]
        answer = cluster.answer(reference)
        if isinstance(answer, WorkerDied):
            self._replace(flight.slot, answer, pending)
            return None
        del self._flights[reference]
        flight.slot.num_running -= len(flight.request.seeds)
        for other in self._flights.values():
            if other.slot is flight.slot:
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

    def _settle(self, reference: Any, pending: deque[GroupRequest]) -> None:
        """Take in a worker's acknowledgement; send it the weights that it lacks."""
        slot = next((slot for slot in self._slots if slot.waiting is reference), None)
        if slot is None:
            return
        answer = cluster.answer(reference)
        if isinstance(answer, Exception):
            if slot.deadline_key == START_KEY and not isinstance(answer, WorkerDied):
                # Another process would meet the same exception.
                raise RolloutError(f"{slot} could not start its engine: {answer}")
            self._replace(slot, answer, pending)
            return
        slot.waiting = None
        if slot.bundle is not self._bundle:
            slot.send(self._bundle, timeout_s=self.config.sync_timeout)
        elif isinstance(answer, LoadReport):
            self._check_canary(slot, answer)
            self._reports.append(answer)

    def _check_canary(self, slot: Slot, report: LoadReport) -> None:
        if self._bundle is not None and not self._bundle.accepts(report.canary_gap):
            raise WeightSyncError(explain_gap(str(slot), report, self._bundle))

    def _replace_late(self, pending: deque[GroupRequest]) -> None:
        """Replace the workers that outlived a deadline."""
        now = time.monotonic()
        late = {flight.slot: GENERATE_KEY for flight in self._flights.values() if flight.deadline <= now}
        late |= {slot: slot.deadline_key for slot in self._slots if slot.waiting is not None and slot.deadline <= now}
        for slot, key in late.items():
            limit = getattr(self.config, key.removeprefix("rollout."))
            error = DeadlineExceeded(f"it took more than {key} = {limit:g} s {_PURPOSE[key]}")
            self._replace(slot, error, pending)

    def _replace(self, slot: Slot, error: Exception, pending: deque[GroupRequest]) -> None:
        """Kill the worker of `slot` and start another; its groups go back to the front of `pending`."""
        import ray

        last_words = f"{slot}: {error}{self._slots.last_words(slot)}"
        ray.kill(slot.actor)
        lost = [reference for reference, flight in self._flights.items() if flight.slot is slot]
        pending.extendleft([self._flights.pop(reference).request for reference in reversed(lost)])
        self.num_restarts += 1
        if self.num_restarts > self.config.max_restarts:
            kind = type(error) if isinstance(error, DeadlineExceeded) else WorkerDied
            raise kind(
                f"rollout workers failed {self.num_restarts} times, and rollout.max_restarts is "
                f"{self.config.max_restarts}. The last: {last_words}"
            )
        self._slots.replace(slot)

    def _drop_flights(self) -> None:
        """Forget every group in flight and tell its worker."""
        for slot in {flight.slot for flight in self._flights.values()}:
            slot.actor.abort.remote()
            slot.num_running = 0
        self._flights.clear()
