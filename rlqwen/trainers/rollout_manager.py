"""Draw scored groups of completions for a trainer: sampled and scored on the main rank, and handed to every rank.

Shapes: P prompts per rollout, G completions per prompt.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlqwen.checkpoint import preserve_rng_state
from rlqwen.config import OnlineConfig
from rlqwen.distributed import MainRank
from rlqwen.reporting import CompletionLog
from rlqwen.rewards import Scorer
from rlqwen.rewards.registry import Reward
from rlqwen.rollout.engine import engine_class
from rlqwen.rollout.engine_placement import count_workers, take_turns, this_machine
from rlqwen.rollout.group_broadcast import pack_groups, unpack_groups
from rlqwen.rollout.group_metrics import describe_groups
from rlqwen.rollout.sampler import Sampler
from rlqwen.rollout.weight_delivery import help_send
from rlqwen.trainers.run_context import RunContext
from rlqwen.trainers.run_logger import Metrics
from rlqwen.types import Group, Prompt


class RolloutManager:
    """Hold the scorer and the sampler of a run.

    The scorer starts at once on the main rank, so that a wrong reward is found early. The sampler, and with it the engine,
    starts at the first draw, so that a wrong argument is found before it.
    """

    def __init__(
        self,
        args: OnlineConfig,
        rewards: Sequence[Reward],
        run: RunContext,
        *,
        main_rank: MainRank,
        processing_class: PreTrainedTokenizerBase,
        columns: set[str],
    ) -> None:
        """Manage rollouts; `columns` names the data's columns for rewards, and may be filled in later."""
        self.scorer: Scorer | None = None
        """On the main rank."""
        self.sampler: Sampler | None = None
        """On the main rank, once something has been sampled."""
        self._args = args
        self._rewards = rewards
        self._output_dir, self._state = run.output_dir, run.state
        self._preemption, self._logger = run.preemption, run.logger
        self._main_rank = main_rank
        self._processing_class = processing_class
        self._columns = columns
        self._log = CompletionLog(run.output_dir)
        self.num_draws = 0
        """Training draws so far; names the next one, from which its sampling seeds derive."""
        self._saved_sampler: dict[str, Any] | None = None
        """State of the sampler that a resumed run has not started yet."""
        main_rank.help_send = partial(help_send, rank=main_rank.ranks.rank)
        main_rank.run(self._start_scorer)

    def configure(
        self,
        *,
        model_folder: str,
        longest_prompt: int,
        end_of_turn: str | None,
        coming_prompts: Callable[[], Sequence[Prompt]],
    ) -> None:
        """Say what the sampler needs when it starts.

        Args:
            model_folder: config, tokenizer and the weights that rollout workers start with.
            longest_prompt: tokens.
            end_of_turn: the token with which the chat template ends a turn, if that is not the tokenizer's EOS.
            coming_prompts: prompts that a checkpoint may hold prefetched groups of, and at least one.
        """
        self._model_folder = model_folder
        self._longest_prompt = longest_prompt
        self._end_of_turn = end_of_turn
        self._coming_prompts = coming_prompts

    def _start_scorer(self) -> None:
        self.scorer = Scorer(
            list(self._rewards),
            self._args.scoring,
            weights=self._args.reward_weights,
            failures_dir=self._output_dir / "reward_failures",
            tokenizer=self._processing_class,
        )
        self.scorer.trainer_state = self._state
        self.scorer.columns = self._columns

    def require_sampler(self) -> Sampler:
        """Return the sampler, started on first use; called on the main rank only."""
        if self.sampler is not None:
            return self.sampler
        if self.scorer is None:
            self._start_scorer()
        assert self.scorer is not None
        engine = engine_class(self._args.rollout)
        if engine.in_workers:
            number = count_workers(self._args.rollout, this_machine(self._main_rank.policy.device.type))
            self._logger.note(f"starting Ray and {number} {engine.title} worker(s), which takes a minute or less")
        with preserve_rng_state():  # a resumed run starts its engine later
            self.sampler = Sampler(
                self._main_rank.policy,
                self._processing_class,
                self.scorer,
                self._args,
                model_path=self._model_folder,
                longest_prompt=self._longest_prompt,
                end_of_turn=self._end_of_turn,
            )
        self._preemption.listen()  # Ray takes SIGTERM for itself
        for note in self.sampler.notes:
            self._logger.note(note)
        self.sampler.wait_until_ready(self._logger.note)
        if self._saved_sampler is not None:
            self.sampler.load_state_dict(self._saved_sampler, self._coming_prompts())
            self._saved_sampler = None
        return self.sampler

    def next_groups(
        self, prompts_P: Sequence[Prompt], coming: Sequence[list[Prompt]], *, among: Sequence[Prompt]
    ) -> tuple[list[Group], Metrics]:
        """Return the scored groups of a training step and metrics of the draw, on every rank.

        Without `rollout.max_staleness` they are drawn from the present weights; with it, from those of some steps ago,
        while the groups of the `coming` steps are being drawn. `among`: rows that other ranks find the prompts in.
        """
        self.num_draws += 1
        name, number = self._draw_name(0), self._args.num_generations
        if not self._args.rollout.max_staleness:
            return self.sample(prompts_P, num_generations=number, draw=name, among=among)
        later = self._name_draws(coming)
        return self._on_all_ranks(
            lambda: self.require_sampler().collect(prompts_P, num_generations=number, draw=name, coming=later), among
        )

    def stream_groups(
        self, prompts_P: Sequence[Prompt], coming: Sequence[list[Prompt]], *, among: Sequence[Prompt], in_order: bool
    ) -> Generator[Group, None, Metrics]:
        """Yield the scored groups of a training step as they become ready, on every rank; return metrics of the draw.

        `in_order`: in the order of the prompts, otherwise as they come, which is the same on all ranks. `coming`, `among`:
        see `next_groups`.
        """
        self.num_draws += 1
        name, number = self._draw_name(0), self._args.num_generations
        later = self._name_draws(coming)
        self._main_rank.run(
            lambda: self.require_sampler().open(prompts_P, num_generations=number, draw=name, coming=later)
        )
        while True:
            groups, _ = self._on_all_ranks(lambda: (self.require_sampler().take(in_order=in_order), {}), among)
            if not groups:
                return self._main_rank.run(lambda: self.require_sampler().close_opened())
            yield from groups

    def sample(
        self, prompts_P: Sequence[Prompt], *, num_generations: int, draw: str, among: Sequence[Prompt]
    ) -> tuple[list[Group], Metrics]:
        """Return scored groups from the present weights and metrics of the draw, on every rank.

        `draw` names the draw within the run, and is part of the sampling seeds.
        """
        return self._on_all_ranks(
            lambda: self.require_sampler().sample(prompts_P, num_generations=num_generations, draw=draw), among
        )

    def _on_all_ranks(
        self, draw: Callable[[], tuple[list[Group], Metrics]], among: Sequence[Prompt]
    ) -> tuple[list[Group], Metrics]:
        self._free_cached_memory()
        drawn: list[Group] = []
        ranks = self._main_rank.ranks

        def work() -> tuple[Any, Metrics]:
            groups, metrics = draw()
            drawn.extend(groups)
            return pack_groups(groups) if ranks.world_size > 1 else None, metrics

        packed, metrics = self._main_rank.run(work)
        return drawn if ranks.is_main else unpack_groups(packed, among), metrics

    def _free_cached_memory(self) -> None:
        """Give this rank's unused GPU memory back for workers that wake up on the same GPU."""
        meanwhile = bool(self._args.train_on_arrival)
        if torch.cuda.is_available() and take_turns(
            self._args.rollout, this_machine("cuda"), trains_meanwhile=meanwhile
        ):
            torch.cuda.empty_cache()

    def _draw_name(self, ahead: int) -> str:
        """Return the name of the training draw so many steps from now."""
        return f"train/{self.num_draws + ahead}"

    def _name_draws(self, coming: Sequence[list[Prompt]]) -> list[tuple[str, list[Prompt]]]:
        return [(self._draw_name(step), prompts) for step, prompts in enumerate(coming, start=1)]

    def evaluate(self, rows: Sequence[Prompt]) -> Metrics:
        """Return mean rewards and lengths of completions for `rows`."""
        metrics = describe_groups(self.sample_evaluation(rows)) | self.scoring_metrics()
        del metrics["tokens/generated"]
        return metrics

    def sample_evaluation(self, rows: Sequence[Prompt]) -> list[Group]:
        """Return groups sampled as in training, from the same seeds at every evaluation, and log them."""
        number = self._args.num_generations_eval or 1
        groups, _ = self.sample(rows, num_generations=number, draw="eval", among=rows)
        self.log_completions(groups, evaluation=True)
        return groups

    def log_completions(self, groups: Sequence[Group], *, evaluation: bool = False) -> None:
        """Write completions beside the metrics of the run."""
        if self._main_rank.ranks.is_main:
            self._log.write(self._state.global_step, groups, evaluation=evaluation)

    def scoring_metrics(self) -> Metrics:
        """Return what the reward workers counted since the last call; nothing except on the main rank."""
        if self.scorer is None:
            return {}
        metrics = self.scorer.metrics()
        self.scorer.reset_metrics()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the number of draws, and the state of the sampler with its prefetched groups."""
        sampler = self._saved_sampler if self.sampler is None else self.sampler.state_dict()
        return {"num_draws": self.num_draws, "sampler": sampler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`; groups that a running sampler has prefetched are discarded."""
        self.num_draws = state["num_draws"]
        if self.sampler is not None:
            self.sampler.discard_prefetched()
        else:
            self._saved_sampler = state["sampler"]

    def close(self) -> None:
        """End the engine and the reward workers; may be called twice."""
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None
        if self.scorer is not None:
            self.scorer.close()
            self.scorer = None
