"""What the trainers that learn from their own completions share: rewards, rollouts, evaluation by sampling.

Shapes: P prompts a rollout, G completions a prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.batch import PackedBatch, Tree, pack, split_trees
from rlqwen.check import prompt_room
from rlqwen.checkpoint import same_random_state
from rlqwen.config import OnlineConfig
from rlqwen.data import as_rows, tokenize_prompts
from rlqwen.losses import Totals
from rlqwen.metrics import CompletionLog
from rlqwen.registry import Reward, check_columns
from rlqwen.scoring import Scorer, build_rewards
from rlqwen.trainers.base import BaseTrainer, Metrics
from rlqwen.trainers.rollouts import Rollouts, describe_groups
from rlqwen.types import Group, Prompt

RewardFunc = str | nn.Module | Reward | Callable[..., list[float | None]]
Args = TypeVar("Args", bound=OnlineConfig)


@dataclass(slots=True)
class Update:
    """One update's share of a rollout."""

    micro_batches: list[PackedBatch]
    totals: Totals
    """Counts of all its completions, those without a gradient included."""
    sums: dict[str, float] = field(default_factory=dict)
    """Metrics of the forward passes, summed over tokens."""

    def add(self, sums: Metrics) -> None:
        """Add the sums of one forward pass."""
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)


class OnlineTrainer(BaseTrainer[Prompt, Args]):
    """Samples completions, scores them, and learns from the scores; see GRPOTrainer and PPOTrainer."""

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
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            reference=reference,
        )
        self.rewards = build_rewards(reward_funcs, tokenizers=reward_processing_classes)
        self.scorer: Scorer | None = self._start_scorer()
        self.train_rows = self.prepare_rows(train_dataset, evaluation=False)
        if eval_dataset is not None:
            self.eval_rows = self.prepare_rows(eval_dataset, evaluation=True)
        self.rollouts: Rollouts | None = None
        self.completions = CompletionLog(self.output_dir)
        self._draws = 0
        self._rollout_progress: dict[str, Any] | None = None
        """Of the engine, where a run that goes on has not started it yet."""

    def prepare_rows(self, dataset: Any, *, evaluation: bool) -> list[Prompt]:
        room = prompt_room(self.policy.base_model.config.max_position_embeddings, self.args)
        prompts, report = tokenize_prompts(
            as_rows(dataset),
            self.processing_class,
            max_prompt_length=room,
            overlong=self.args.overlong_prompts,
            chat_template_kwargs=self.args.chat_template_kwargs,
        )
        name = "eval" if evaluation else "train"
        for reward in self.rewards:
            check_columns(reward, prompts[0].columns, f"{name}_dataset")
        self.reports[name] = report
        return prompts

    def next_draw(self) -> str:
        """Name of the next training draw, which its sampling seeds derive from."""
        self._draws += 1
        return f"train/{self._draws}"

    def micro_batches(self, trees: Sequence[Tree]) -> list[PackedBatch]:
        """Packed micro-batches of trees of completions, as large as the config allows."""
        limit = self.args.max_tokens_per_micro_batch
        parts = split_trees(
            trees, max_tokens=limit, max_branches=self.args.per_device_train_batch_size if limit is None else None
        )
        return [pack(part) for part in parts]

    def _start_scorer(self) -> Scorer:
        scorer = Scorer(
            self.rewards,
            self.args.scoring,
            weights=self.args.reward_weights,
            failures_dir=self.output_dir / "reward_failures",
            tokenizer=self.processing_class,
        )
        scorer.trainer_state = self.state
        return scorer

    def scoring_metrics(self) -> Metrics:
        """What the reward workers counted since the last call."""
        assert self.scorer is not None
        metrics = self.scorer.metrics()
        self.scorer.reset_metrics()
        return metrics

    def compute_evaluation(self, rows: list[Prompt]) -> Metrics:
        """Mean rewards of completions sampled as in training, from the same seeds at every evaluation."""
        count = self.args.num_generations_eval or 1
        groups, _ = self.require_rollouts().sample(rows, num_generations=count, draw="eval")
        self.completions.write(self.state.global_step, groups, evaluation=True)
        figures = describe_groups(groups) | self.scoring_metrics()
        del figures["tokens/generated"]
        return figures

    def require_rollouts(self) -> Rollouts:
        """The engine, started at its first use, so that a wrong argument is found before."""
        if self.rollouts is None:
            if self.scorer is None:
                self.scorer = self._start_scorer()
            rows = self.train_rows + (self.eval_rows or [])
            with same_random_state():  # a run that goes on starts its engine later
                self.rollouts = Rollouts(
                    self.policy,
                    self.processing_class,
                    self.scorer,
                    self.args,
                    model_path=self.folder_for_workers(),
                    longest_prompt=max(len(prompt.token_ids) for prompt in rows),
                    end_of_turn=self.reports["train"].end_of_turn,
                )
            if self._rollout_progress is not None:
                self.rollouts.restore_progress(self._rollout_progress, self.train_rows)
            self.stop.listen()  # Ray takes SIGTERM for itself
            if self.rollouts.note is not None:
                self._note(self.rollouts.note)
        return self.rollouts

    def folder_for_workers(self) -> str:
        """Where rollout workers, and a critic, find config, tokenizer and the weights that they start with."""
        if self.model_folder is None or not self.policy.has_base_of(self.model_folder):
            folder = self.output_dir / "base_model" / "given"
            self.policy.save(folder, adapter=False)
            self.processing_class.save_pretrained(folder)
            self.model_folder = str(folder)
        return self.model_folder

    def progress(self) -> dict[str, Any]:
        rollouts = self._rollout_progress if self.rollouts is None else self.rollouts.progress()
        return super().progress() | {"draws": self._draws, "rollouts": rollouts}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        super().restore_progress(progress)
        self._draws, self._rollout_progress = progress["draws"], progress["rollouts"]

    def after_restore(self) -> None:
        if self.rollouts is not None:
            self.rollouts.policy_changed()

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


def mean_over_tokens(updates: Sequence[Update], num_passes: int) -> Metrics:
    """Means over all trained tokens, and how many there were."""
    micros = [micro for update in updates for micro in update.micro_batches]
    targets = sum(micro.num_targets for micro in micros)
    sums: dict[str, float] = {}
    for update in updates:
        for key, value in update.sums.items():
            sums[key] = sums.get(key, 0.0) + value
    trained = sum(micro.num_tokens for micro in micros) * num_passes
    unsampled = sum(micro.num_targets for micro in micros if micro.sampler_logp_N is None)
    return {key: value / max(targets * num_passes, 1) for key, value in sums.items()} | {
        "sampling/logp_missing": unsampled / max(targets, 1),
        "tokens/trained": float(trained),
    }
