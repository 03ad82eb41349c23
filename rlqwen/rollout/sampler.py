"""Sample groups for a trainer from the policy's weights, at once or ahead, and score them as they arrive.

Shapes: P prompts, G completions per prompt.
"""

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlqwen.config import OnlineConfig
from rlqwen.errors import ConfigError
from rlqwen.models.loading import stop_token_ids
from rlqwen.models.policy import Policy
from rlqwen.rewards import Scorer
from rlqwen.rollout import Engine, RolloutEngine, build_engine
from rlqwen.rollout.engine import engine_class
from rlqwen.rollout.engine_placement import growth_of, place_engine, this_machine
from rlqwen.rollout.group_metrics import describe_lag
from rlqwen.rollout.opened_draw import OpenedDraw
from rlqwen.rollout.policy_sync import PolicySync, add_sync, choose_sync
from rlqwen.rollout.pool import RolloutPool
from rlqwen.rollout.prefetch import Prefetcher, RolloutBatch
from rlqwen.rollout.sampling_parameters import refuse_unknown_tokens, sampling_of, sampling_seed
from rlqwen.types import Group, GroupRequest, Prompt


class Sampler:
    """Hold the engine and the scorer, and the rollout batches that are sampled ahead.

    Weights are sent lazily: a draw sends them first if the policy has changed since the last one.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        args: OnlineConfig,
        *,
        model_path: str,
        longest_prompt: int,
        end_of_turn: str | None,
    ) -> None:
        """Start the engine.

        Args:
            model_path: folder whose config and tokenizer the engine starts with; its weights are the policy's base
                where only the adapter is sent, else they are replaced before the first sample.
            longest_prompt: in tokens.
            end_of_turn: the token with which the chat template ends a turn, where that is not the tokenizer's EOS.
        """
        self.policy = policy
        self.scorer = scorer
        self.args = args
        own_dtype = str(policy.compute_dtype).removeprefix("torch.")
        engine = engine_class(args.rollout)
        self.compute_dtype, dtype_note = engine.choose_dtype(args.rollout, model_path, own_dtype)
        self.max_model_length = args.rollout.max_model_length or longest_prompt + args.max_completion_length
        lora_rank, sync_note = choose_sync(policy, args.rollout)
        self.notes = [note for note in (dtype_note, sync_note) if note is not None]
        """Notes for the user on what was chosen."""
        ends = stop_token_ids(tokenizer, policy.generation_config, end_of_turn)
        self.sampling = sampling_of(args, ends)
        self._weights = PolicySync(
            policy,
            lora_rank=lora_rank,
            dtype=self.compute_dtype,
            tolerance=args.rollout.canary_tolerance,
            max_length=self.max_model_length - 1,
        )
        refuse_unknown_tokens(args.generation_kwargs, policy.text_config.vocab_size)
        self.engine = self._start_engine(engine, model_path, tokenizer)
        self.max_staleness = args.rollout.max_staleness
        if self.max_staleness and not engine.in_workers:
            raise ConfigError(
                f"rollout.max_staleness={self.max_staleness} lets workers sample while the policy trains, but the engine "
                f"{engine.title} samples in the trainer's own process: set it to 0, or use vllm"
            )
        self._in_flight = args.rollout.in_flight_updates
        if self._in_flight:
            self.notes.append(
                "rollout.in_flight_updates: timing decides which weights sample a token, so a resumed run does not repeat to "
                "the bit"
            )
        self._prefetcher = Prefetcher(self.engine)
        self._opened: OpenedDraw | None = None
        self._num_dropped = 0
        """Groups that were too stale for the opened draw."""
        self._coming: list[tuple[str, list[Prompt]]] = []
        """Names and prompts of coming steps whose batches are not begun yet."""
        self._num_coming = 0
        """Completions per prompt of those."""

    def _start_engine(self, engine: type[Engine], model_path: str, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
        machine = this_machine(self.policy.device.type)
        placement = place_engine(
            self.args.rollout.model_copy(update={"dtype": self.compute_dtype}),
            engine,
            machine,
            sends_adapter=self._weights.lora_rank is not None,
            trains_meanwhile=bool(self.args.train_on_arrival),
        )
        self.notes += placement.notes
        return build_engine(
            placement.config,
            model_path=model_path,
            tokenizer=tokenizer,
            policy=self.policy,
            compute_dtype=self.compute_dtype,
            max_model_length=self.max_model_length,
            seed=self.args.seed,
            lora_rank=self._weights.lora_rank,
            reads_text=self.sampling.reads_text,
            placement=placement,
            reserved_bytes=growth_of(self.policy.trained_parameters, self.args.parallel, machine.world_size),
        )

    def wait_until_ready(self, announce: Callable[[str], None]) -> None:
        """Wait until the engine is up; an engine in the trainer's process always is."""
        if isinstance(self.engine, RolloutPool):
            self.engine.wait_until_ready(announce)

    def state_dict(self) -> dict[str, Any]:
        """Return the version of the weights, whether the engine has them, what the first sync measured, and the
        prefetched batches."""
        self._weights.notice_changes()
        return self._weights.state_dict() | {"prefetched": self._prefetcher.state_dict()}

    def load_state_dict(self, state: dict[str, Any], prompts_P: Sequence[Prompt]) -> None:
        """Restore the state saved by `state_dict`.

        An engine that had the present weights gets them now, so that it does not count in the metrics of a step.
        """
        self._weights.load_state_dict(state)
        batches: list[RolloutBatch] = []
        start = 0
        for saved in state["prefetched"]:
            batches.append(RolloutBatch.from_state(saved, prompts_P, self.scorer, start))
            start += len(saved["groups"])
        self._prefetcher.restore(batches)
        if state["synced"]:
            self._sync(prompts_P)

    def discard_prefetched(self) -> None:
        """Discard what was sampled for coming steps, because the weights were replaced by others."""
        self._prefetcher.discard()

    def sample(
        self, prompts_P: Sequence[Prompt], *, num_generations: int, draw: str
    ) -> tuple[list[Group], dict[str, float]]:
        """Return one scored group per prompt from the present weights, in the order of `prompts_P`, and metrics.

        `draw` names this rollout batch within the run, and is part of the sampling seeds.
        """
        self._weights.notice_changes()
        self._prefetcher.drain()
        metrics = self._sync(prompts_P)
        batch = self._batch(prompts_P, num_generations, draw)
        batch.sample(self.engine)
        sampled = time.monotonic()
        groups_P = batch.score()
        batch.count()
        return groups_P, metrics | {"time/rollout": batch.seconds, "time/reward": time.monotonic() - sampled}

    def collect(
        self,
        prompts_P: Sequence[Prompt],
        *,
        num_generations: int,
        draw: str,
        coming: Sequence[tuple[str, list[Prompt]]],
    ) -> tuple[list[Group], dict[str, float]]:
        """Return what `sample` returns, prefetched if it was and no staler than `max_staleness`.

        Begins to sample the batches of the `coming` steps, given as names and prompts, with the present weights.
        """
        self._weights.notice_changes()
        in_flight = self._update_in_flight(prompts_P)
        started = time.monotonic()
        batch = self._prefetcher.collect(draw)
        waited = time.monotonic()
        dropped = batch is not None and self._is_useless(batch, prompts_P)
        if batch is None or dropped:
            groups_P, metrics = self.sample(prompts_P, num_generations=num_generations, draw=draw)
        else:
            groups_P = batch.score()
            batch.count()
            metrics = {
                "time/rollout": waited - started,
                "time/rollout_hidden": max(batch.seconds - (waited - started), 0.0),
                "time/reward": time.monotonic() - waited,
            }
        metrics = self._begin_coming(coming, num_generations, add_sync(in_flight, metrics))
        return groups_P, metrics | self._staleness(groups_P, num_dropped=len(prompts_P) if dropped else 0)

    def open(
        self,
        prompts_P: Sequence[Prompt],
        *,
        num_generations: int,
        draw: str,
        coming: Sequence[tuple[str, list[Prompt]]] = (),
    ) -> None:
        """Begin what `collect` does, or `sample` if nothing is prefetched; `take` returns the groups as they are scored.

        The batches of the coming steps begin as soon as this one is sampled.
        """
        self._weights.notice_changes()
        metrics = self._update_in_flight(prompts_P)
        batch = self._prefetcher.open_begun(draw)
        dropped = batch is not None and self._is_useless(batch, prompts_P)
        if batch is None or dropped:
            metrics = add_sync(metrics, self._sync(prompts_P))
            batch = self._batch(prompts_P, num_generations, draw)
            self._prefetcher.open(batch)
        self._opened, self._num_dropped = OpenedDraw(batch, metrics), len(prompts_P) if dropped else 0
        self._coming, self._num_coming = list(coming), num_generations

    def take(self, *, in_order: bool) -> list[Group]:
        """Return scored groups of the opened draw that were not taken yet, at least one; none once all are taken.

        `in_order`: in the order of the prompts, otherwise as they come.
        """
        assert self._opened is not None
        if self._opened.is_sampled and self._coming:
            self._prefetcher.close_opened()
            self._opened.metrics = self._begin_coming(self._coming, self._num_coming, self._opened.metrics)
            self._coming = []
        if groups := self._opened.take(in_order=in_order):
            return groups
        self._prefetcher.close_opened()
        return []

    def close_opened(self) -> dict[str, float]:
        """End the opened draw, all of whose groups are taken, and return its metrics."""
        assert self._opened is not None
        opened, self._opened = self._opened, None
        metrics = self._begin_coming(self._coming, self._num_coming, opened.metrics) | opened.close()
        if self.max_staleness:
            metrics |= self._staleness(opened.groups, num_dropped=self._num_dropped)
        return metrics

    def _is_useless(self, batch: RolloutBatch, prompts_P: Sequence[Prompt]) -> bool:
        """Return whether a prefetched batch is too stale, or was sampled for other prompts."""
        return self._weights.version - batch.version > self.max_staleness or batch.prompts_differ(prompts_P)

    def _staleness(self, groups: Sequence[Group], *, num_dropped: int) -> dict[str, float]:
        lag = {"groups/staleness": float(self._weights.version - groups[0].policy_version)}
        if self._in_flight:
            lag = describe_lag(groups, self._weights.version)
        return lag | {"groups/stale_dropped": float(num_dropped)}

    def _update_in_flight(self, prompts_P: Sequence[Prompt]) -> dict[str, float]:
        """Send the policy's weights while groups are being sampled, if that is asked for."""
        return self._sync(prompts_P) if self._in_flight else {"time/sync": 0.0}

    def _begin_coming(
        self, coming: Sequence[tuple[str, list[Prompt]]], num_generations: int, metrics: dict[str, float]
    ) -> dict[str, float]:
        """Begin the batches of coming steps with the present weights; return `metrics` with those of sending them."""
        for name, prompts in coming:
            if name not in self._prefetcher:
                metrics = add_sync(metrics, self._sync(prompts))
                self._prefetcher.begin(self._batch(prompts, num_generations, name))
        return metrics

    def _batch(self, prompts_P: Sequence[Prompt], num_generations: int, name: str) -> RolloutBatch:
        requests = [
            # A copy, because groups are told apart by their prompts, and the same row may come twice.
            GroupRequest(copy.copy(prompt), self._seeds(name, place, num_generations), self.sampling)
            for place, prompt in enumerate(prompts_P)
        ]
        return RolloutBatch(name, requests, self.scorer, self._weights.version)

    def _seeds(self, draw: str, place: int, count: int) -> tuple[int, ...]:
        return tuple(sampling_seed(self.args.seed, draw, place, sample) for sample in range(count))

    def _sync(self, prompts_P: Sequence[Prompt]) -> dict[str, float]:
        if not self._in_flight:
            self._prefetcher.drain()
        return self._weights.send(self.engine, prompts_P[0].token_ids)

    def close(self) -> None:
        """End the engine."""
        self._prefetcher.close()
        self.engine.close()
