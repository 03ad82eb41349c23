"""What the trainers that learn from their own completions share: rewards, rollouts, evaluation by sampling.

Shapes: P prompts a rollout, G completions a prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.algorithms.losses import Totals
from rlqwen.checkpoint import same_random_state
from rlqwen.config import OnlineConfig
from rlqwen.data import DataReport, as_rows, longest_prompt, tokenize_prompts
from rlqwen.data.prompts import PromptJob
from rlqwen.data.streams import StreamedRows
from rlqwen.data.tokenizing_jobs import Tally
from rlqwen.errors import ConfigError
from rlqwen.packing.batch import PackedBatch, Tree
from rlqwen.preflight import prompt_room
from rlqwen.reporting import CompletionLog
from rlqwen.rewards import Scorer, build_rewards
from rlqwen.rewards.registry import Reward, check_rows, taken_columns
from rlqwen.rollout.group_broadcast import pack_groups, unpack_groups
from rlqwen.rollout.resources import uses_vllm
from rlqwen.rollout.sampler import Sampler, describe_groups
from rlqwen.run_folder.layout import refuse_needed_inside
from rlqwen.trainers.base import Trainer
from rlqwen.trainers.item_stream import WINDOW, ItemStream, describe_first
from rlqwen.trainers.micro_batching import add_up, count_tokens, micro_batches
from rlqwen.trainers.telling import Metrics
from rlqwen.types import Group, Prompt, Truncation

RewardFunc = str | nn.Module | Reward | Callable[..., list[float | None]]
Args = TypeVar("Args", bound=OnlineConfig)

_LOSS, _TOKENS, _TARGETS = "loss", "tokens/trained", "targets"
_UNSAMPLED = "sampling/logp_missing"


@dataclass(slots=True)
class Update:
    """One update's share of a rollout."""

    micro_batches: list[PackedBatch]
    """This rank's."""
    totals: Totals
    """Counts of all its completions on all ranks, those without a gradient included."""
    sums: dict[str, float] = field(default_factory=dict)
    """This rank's shares of the loss, and metrics of its forward passes, summed over tokens."""

    def add(self, loss: Tensor, sums: Mapping[str, Tensor | float]) -> None:
        """Add a micro-batch's share of the loss, and the sums of its forward pass."""
        add_up(self.sums, {_LOSS: loss.detach(), **sums})


class OnlineTrainer(Trainer[Prompt, Args]):
    """Samples completions, scores them, and learns from the scores; see GRPOTrainer and PPOTrainer.

    Of several ranks the main one samples and scores, and hands the groups to all.
    """

    default_best_metric = "eval/reward/mean"

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        args: Args,
        *,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: PreTrainedTokenizerBase | None,
        callbacks: Sequence[TrainerCallback] | None,
        peft_config: Any,
        reward_processing_classes: Any,
        reference: bool | nn.Module,
    ) -> None:
        funcs = (
            reward_funcs if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str) else [reward_funcs]
        )
        if args.output_dir and args.overwrite_output_dir and not args.resume_from_checkpoint:
            names = [func for func in funcs if isinstance(func, str)]
            paths = {f"reward_funcs[{place}]": name.rpartition(":")[0] or name for place, name in enumerate(names)}
            refuse_needed_inside(args.output_dir, paths)
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            reference=reference,
        )
        if args.rollout.routing_replay:
            self._replay_routing()
        self.rewards = build_rewards(reward_funcs, tokenizers=reward_processing_classes)
        self.scorer: Scorer | None = None
        self._columns: set[str] = set()
        """Of all rows, for the scorer."""
        self.main_rank.run(self._start_scorer)
        self.read_training_data(train_dataset)
        if eval_dataset is not None:
            self.eval_rows = self.prepare_rows(eval_dataset, evaluation=True)
        self.workers_folder = self._folder_for_workers()
        self.rollouts: Sampler | None = None
        """On the main rank, once something has been sampled."""
        self.completions = CompletionLog(self.output_dir)
        if args.correction_note:
            self._note(args.correction_note)
        self._draws = 0
        self._rollout_progress: dict[str, Any] | None = None
        """Of the engine, where a run that goes on has not started it yet."""

    def _replay_routing(self) -> None:
        if not uses_vllm(self.args.rollout):
            raise ConfigError(
                "rollout.routing_replay=true replays experts that vLLM chose, and vllm is not installed: install it, or "
                "leave routing_replay out"
            )
        self.policy.replay_routing()

    def prepare_rows(self, dataset: Any, *, evaluation: bool) -> Sequence[Prompt]:
        room = prompt_room(self.policy.text_config.max_position_embeddings, self.args)
        prompts, report = tokenize_prompts(
            as_rows(dataset),
            self.processing_class,
            max_prompt_length=room,
            overlong=self.args.overlong_prompts,
            chat_template_kwargs=self.args.chat_template_kwargs,
            num_proc=self.args.dataset_num_proc,
        )
        self._look_at(prompts, report, "eval" if evaluation else "train")
        return prompts

    def prepare_stream(self, rows: StreamedRows) -> Callable[[], ItemStream[Prompt]]:
        job = PromptJob(
            self.processing_class,
            max_prompt_length=prompt_room(self.policy.text_config.max_position_embeddings, self.args),
            overlong=self.args.overlong_prompts,
            chat_template=None,
            chat_template_kwargs=self.args.chat_template_kwargs,
        )
        self._look_at(job.run(0, rows.first(WINDOW), None)[0], describe_first(rows, job), "train")

        def make(start: int, window: list[dict[str, Any]]) -> tuple[Sequence[Prompt], Tally]:
            prompts, tally = job.run(start, window, None)
            if self.args.overlong_prompts == "refuse" and tally.report.num_overlong:
                job.finish(tally, None)  # which refuses
            return prompts, tally

        return lambda: ItemStream(rows, make)

    def _look_at(self, prompts: Sequence[Prompt], report: DataReport, name: str) -> None:
        """Check the rewards against the rows' columns, and keep the report."""
        columns, lines = check_rows(self.rewards, (prompt.columns for prompt in prompts), f"{name}_dataset")
        self._columns |= columns
        report.warnings += lines
        report.name_unused(taken_columns(self.rewards))
        self.reports[name] = report

    @property
    def truncation(self) -> Truncation | None:
        """Return the truncation of the policy's distribution in the engine; None: no truncation, or nothing is compared."""
        given = None if self.args.uncomparable else self.args.truncation
        is_vllm_on_cpu = uses_vllm(self.args.rollout) and self.policy.device.type == "cpu"
        return given and replace(given, keeps_ties=is_vllm_on_cpu)

    def micro_batches(self, trees: Sequence[Tree]) -> list[PackedBatch]:
        """This rank's packed micro-batches of trees of completions, as large as the config allows."""
        limit = self.args.max_tokens_per_micro_batch
        size = self.args.per_device_train_batch_size if limit is None else None
        return list(micro_batches(trees, self.ranks, max_tokens=limit, max_branches=size))

    def sample(
        self, prompts_P: Sequence[Prompt], *, num_generations: int, draw: str, among: Sequence[Prompt]
    ) -> tuple[list[Group], Metrics]:
        """Scored groups, and figures of how they came about, on every rank; `among`: the rows that prompts are from."""
        return self._on_all(
            lambda: self.require_rollouts().sample(prompts_P, num_generations=num_generations, draw=draw), among
        )

    def _on_all(
        self, draw: Callable[[], tuple[list[Group], Metrics]], among: Sequence[Prompt]
    ) -> tuple[list[Group], Metrics]:
        """What the main rank draws, on every rank."""
        drawn: list[Group] = []

        def work() -> tuple[Any, Metrics]:
            groups, metrics = draw()
            drawn.extend(groups)
            return pack_groups(groups) if self.ranks.world_size > 1 else None, metrics

        packed, metrics = self.main_rank.run(work)
        return drawn if self.ranks.is_main else unpack_groups(packed, among), metrics

    def next_groups(self, prompts_P: Sequence[Prompt]) -> tuple[list[Group], Metrics]:
        """The scored groups of a training step, on every rank; from the present weights, or with
        `rollout.max_staleness` from those of some steps ago, while the groups of the coming steps are being drawn."""
        self._draws += 1
        draw, number = self._draw_name(0), self.args.num_generations
        lag = self.args.rollout.max_staleness
        if not lag:
            return self.sample(prompts_P, num_generations=number, draw=draw, among=self.train_rows or prompts_P)
        size, left = self.plan.rows_per_step, self.state.max_steps - self.state.global_step
        coming = [
            (self._draw_name(step), self.stream.peek((step - 1) * size, size))
            for step in range(1, lag + 1)
            if step * self.plan.updates_per_step < left
        ]
        return self._on_all(
            lambda: self.require_rollouts().take(prompts_P, num_generations=number, draw=draw, coming=coming),
            self.train_rows or prompts_P,
        )

    def _draw_name(self, ahead: int) -> str:
        """Name of the training draw so many steps from now, which its sampling seeds derive from."""
        return f"train/{self._draws + ahead}"

    def summarise(self, updates: Sequence[Update], num_passes: int) -> Metrics:
        """Of all ranks: the mean loss of an update, means over all trained tokens, and how many there were."""
        own: Metrics = {}
        for update in updates:
            add_up(own, update.sums)
        micros = [micro for update in updates for micro in update.micro_batches]
        own[_TARGETS] = float(sum(micro.num_targets for micro in micros) * num_passes)
        own[_TOKENS] = count_tokens(micros) * num_passes
        # A mean over targets like the rest: those that came without the sampler's logprob.
        own[_UNSAMPLED] = float(sum(micro.num_targets for micro in micros if micro.sampler_logp_N is None) * num_passes)
        sums = {_LOSS: 0.0} | self.ranks.sum(own)
        loss, tokens, targets = (sums.pop(key) for key in (_LOSS, _TOKENS, _TARGETS))
        means = {key: value / max(targets, 1.0) for key, value in sums.items()}
        return means | {_TOKENS: tokens, _LOSS: loss / (len(updates) * num_passes)}

    def policy_changed(self) -> None:
        """The policy's weights are new; whoever samples next must sample from them."""
        if self.rollouts is not None:
            self.rollouts.policy_changed()

    def write_completions(self, groups: Sequence[Group], *, evaluation: bool = False) -> None:
        """Keep them beside the metrics."""
        if self.ranks.is_main:
            self.completions.write(self.state.global_step, groups, evaluation=evaluation)

    def _start_scorer(self) -> None:
        self.scorer = Scorer(
            self.rewards,
            self.args.scoring,
            weights=self.args.reward_weights,
            failures_dir=self.output_dir / "reward_failures",
            tokenizer=self.processing_class,
        )
        self.scorer.trainer_state = self.state
        self.scorer.columns = self._columns

    def scoring_metrics(self) -> Metrics:
        """What the reward workers counted since the last call; nothing where there are none, off the main rank."""
        if self.scorer is None:
            return {}
        metrics = self.scorer.metrics()
        self.scorer.reset_metrics()
        return metrics

    def compute_evaluation(self, rows: Sequence[Prompt]) -> Metrics:
        """Mean rewards of completions sampled as in training, from the same seeds at every evaluation."""
        count = self.args.num_generations_eval or 1
        groups, _ = self.sample(rows, num_generations=count, draw="eval", among=rows)
        self.write_completions(groups, evaluation=True)
        figures = describe_groups(groups) | self.scoring_metrics()
        del figures["tokens/generated"]
        return figures

    def require_rollouts(self) -> Sampler:
        """The engine of the main rank, started at its first use, so that a wrong argument is found before."""
        if self.rollouts is None:
            if self.scorer is None:
                self._start_scorer()
            if uses_vllm(self.args.rollout):
                self._note(
                    f"starting Ray and {self.args.rollout.num_workers} vLLM worker(s), which takes a minute or less"
                )
            with same_random_state():  # a run that goes on starts its engine later
                assert self.scorer is not None
                self.rollouts = Sampler(
                    self.main_rank.policy,
                    self.processing_class,
                    self.scorer,
                    self.args,
                    model_path=self.workers_folder,
                    longest_prompt=self._longest_prompt(),
                    end_of_turn=self.reports["train"].end_of_turn,
                )
            self.preemption.listen()  # Ray takes SIGTERM for itself
            for note in self.rollouts.notes:
                self._note(note)
            self.rollouts.wait_until_ready(self._note)
            if self._rollout_progress is not None:
                self.rollouts.restore_progress(self._rollout_progress, self.train_rows or self._coming_prompts())
        return self.rollouts

    def _longest_prompt(self) -> int:
        """Return the tokens of the longest prompt; for a stream, the limit for a prompt."""
        if self.new_stream is not None:
            return prompt_room(self.policy.text_config.max_position_embeddings, self.args)
        return max(map(longest_prompt, (self.train_rows, self.eval_rows or [])))

    def _coming_prompts(self) -> list[Prompt]:
        """Return a stream's prompts that may have been sampled ahead, and one to check the weights with."""
        return self.stream.peek(0, self.args.rollout.max_staleness * self.plan.rows_per_step + 1)

    def _folder_for_workers(self) -> str:
        """Where rollout workers, and a critic, find config, tokenizer and the weights that they start with."""
        if self.model_folder is not None and self.policy.has_base_of(self.model_folder):
            return self.model_folder
        self.align_stop_tokens()
        folder = self.output_dir / "base_model" / "given"
        self.policy.save(folder, adapter=False, write=self.ranks.is_main)
        if self.ranks.is_main:
            self.processing_class.save_pretrained(folder)
        self.ranks.barrier()
        return str(folder)

    def progress(self) -> dict[str, Any]:
        rollouts = self._rollout_progress if self.rollouts is None else self.rollouts.progress()
        return super().progress() | {"draws": self._draws, "rollouts": rollouts}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        super().restore_progress(progress)
        self._draws, self._rollout_progress = progress["draws"], progress["rollouts"]
        if self.rollouts is not None:
            self.rollouts.forget_ahead()

    def after_restore(self) -> None:
        self.policy_changed()

    def close(self) -> None:
        if self.rollouts is not None:
            self.rollouts.close()
            self.rollouts = None
        if self.scorer is not None:
            self.scorer.close()
            self.scorer = None


def deal(completions: Sequence[tuple[Group, int]], size: int) -> Iterator[list[tuple[Group, list[int]]]]:
    """Deal completions out in shares of `size`, in order: a share names groups and which of their completions it holds."""
    for start in range(0, len(completions), size):
        share: dict[int, tuple[Group, list[int]]] = {}
        for group, index in completions[start : start + size]:
            share.setdefault(id(group), (group, []))[1].append(index)
        yield list(share.values())
