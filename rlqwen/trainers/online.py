"""Hold what the trainers that sample have in common: prompts, rewards, rollouts, evaluation by sampling.

Shapes: P prompts per rollout, G completions per prompt.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.algorithms.loss_metrics import Metric, MetricSums, add_on_device, read_scalars
from rlqwen.algorithms.losses import Totals
from rlqwen.checkpoint.fingerprint import reward_fingerprint
from rlqwen.config import OnlineConfig
from rlqwen.data import longest_prompt
from rlqwen.data.streams import StreamedRows
from rlqwen.errors import ConfigError
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, PackedBatch, Tree
from rlqwen.rewards import build_rewards
from rlqwen.rewards.registry import Reward
from rlqwen.rollout.engine import engine_class
from rlqwen.rollout.engine_placement import count_workers, this_machine
from rlqwen.rollout.group_metrics import describe_groups
from rlqwen.run_folder.layout import refuse_needed_inside
from rlqwen.trainers.base import Trainer
from rlqwen.trainers.checkpointer import Stateful
from rlqwen.trainers.item_stream import ItemStream
from rlqwen.trainers.micro_batching import count_tokens, micro_batches
from rlqwen.trainers.prompt_data import PromptData
from rlqwen.trainers.rollout_manager import RolloutManager
from rlqwen.trainers.run_logger import Metrics
from rlqwen.types import Completion, Group, Prompt, Truncation

RewardFunc = str | nn.Module | Reward | Callable[..., Sequence[float | None]]
Args = TypeVar("Args", bound=OnlineConfig)


@dataclass(slots=True)
class Update:
    """One update's share of a rollout."""

    micro_batches: list[PackedBatch]
    """This rank's."""
    totals: Totals
    """Counts of all its completions on all ranks, those without a gradient included."""
    loss: Tensor | float = 0.0
    """This rank's share of the loss, added up over micro-batches and passes."""
    rescale: float | None = None
    """What the gradient must be multiplied by, if it is gathered already, for totals that were not known then."""
    metrics: MetricSums = field(default_factory=MetricSums)
    """Metrics of this rank's forward passes."""

    def add(self, loss: Tensor, metrics: Mapping[str, Metric]) -> None:
        """Add a micro-batch's share of the loss, and the metrics of its forward pass."""
        self.loss = add_on_device(self.loss, loss)
        self.metrics.add(metrics)


@dataclass(slots=True)
class Learned:
    """Say what an algorithm did in a step."""

    groups_P: Sequence[Group]
    """The groups that were drawn."""
    updates: Sequence[Update]
    metrics: Metrics
    """Those of the draw, and the algorithm's own."""
    num_passes: int = 1
    """How often each update was made."""


class OnlineTrainer(Trainer[Prompt, Args, Policy]):
    """Sample completions, score them, and learn from the scores; see GRPOTrainer and PPOTrainer.

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
        _refuse_rewards_inside(reward_funcs, args)
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
        self.prompt_data = PromptData(
            self.args,
            self.rewards,
            processing_class=self.processing_class,
            context=self.policy.text_config.max_position_embeddings,
            reports=self.reports,
        )
        self.rollouts = RolloutManager(
            self.args,
            self.rewards,
            self.context,
            main_rank=self.main_rank,
            processing_class=self.processing_class,
            columns=self.prompt_data.columns,
        )
        self.load_data(train_dataset, eval_dataset)
        self.workers_folder = self._folder_for_workers()
        self.rollouts.configure(
            model_folder=self.workers_folder,
            longest_prompt=self._longest_prompt(),
            end_of_turn=self.reports["train"].end_of_turn,
            coming_prompts=self._coming_prompts,
        )
        if args.correction_note:
            self.logger.note(args.correction_note)

    def _replay_routing(self) -> None:
        engine = engine_class(self.args.rollout)
        if not engine.returns_experts:
            raise ConfigError(
                f"rollout.routing_replay=true replays experts that the engine chose, and {engine.title} does not report "
                "them: install and use vllm, or leave routing_replay out"
            )
        self.policy.replay_routing()

    # Data

    def prepare_rows(self, dataset: Any, *, evaluation: bool) -> Sequence[Prompt]:
        return self.prompt_data.prepare(dataset, "eval" if evaluation else "train")

    def prepare_stream(self, rows: StreamedRows) -> Callable[[], ItemStream[Prompt]]:
        return self.prompt_data.stream(rows)

    def _longest_prompt(self) -> int:
        """Return the tokens of the longest prompt; for a stream, the limit for a prompt."""
        if self.new_stream is not None:
            return self.prompt_data.room
        return max(map(longest_prompt, (self.train_rows, self.eval_rows or [])))

    def _coming_prompts(self) -> Sequence[Prompt]:
        """Return all prompts; of a stream, those that may have been sampled already, and one more."""
        if self.train_rows:
            return self.train_rows
        return self.stream.peek(0, self.args.rollout.max_staleness * self.plan.rows_per_step + 1)

    def _folder_for_workers(self) -> str:
        """Return the folder with config, tokenizer and weights that rollout workers, and a critic, start with."""
        if self.model_folder is not None and self.policy.has_base_of(self.model_folder):
            return self.model_folder
        self.align_stop_tokens()
        folder = self.output_dir / "base_model" / "given"
        self.policy.save(folder, adapter=False, write=self.ranks.is_main)
        if self.ranks.is_main:
            self.processing_class.save_pretrained(folder)
        self.ranks.barrier()
        return str(folder)

    # A step

    @abstractmethod
    def learn(self, prompts_P: list[Prompt]) -> Learned:
        """Draw scored groups by `next_groups`, and train on them, with `plan.updates_per_step` calls of `update`."""

    def step(self, prompts_P: list[Prompt]) -> Metrics:
        learned = self.learn(prompts_P)
        self.rollouts.log_completions(learned.groups_P)
        trained = self.summarize(learned.updates, learned.num_passes)
        return learned.metrics | self.describe(learned.groups_P) | trained

    def describe(self, groups_P: Sequence[Group]) -> Metrics:
        """Return means over the completions, and what the reward workers counted since the last call."""
        return describe_groups(groups_P) | self.rollouts.scoring_metrics()

    def next_groups(self, prompts_P: Sequence[Prompt]) -> tuple[list[Group], Metrics]:
        """Return the scored groups of a training step and metrics of the draw, on every rank."""
        return self.rollouts.next_groups(prompts_P, self.coming_prompts(), among=self.train_rows or prompts_P)

    def coming_prompts(self) -> list[list[Prompt]]:
        """Return the prompts of the steps whose groups are sampled while the policy trains."""
        size, left = self.plan.rows_per_step, self.state.max_steps - self.state.global_step
        return [
            self.stream.peek((step - 1) * size, size)
            for step in range(1, self.args.rollout.max_staleness + 1)
            if step * self.plan.updates_per_step < left
        ]

    @property
    def truncation(self) -> Truncation | None:
        """Truncation of the policy's distribution in the engine; None: no truncation, or nothing is compared."""
        truncation = self.args.truncation
        if truncation is None or self.args.uncomparable:
            return None
        return replace(truncation, keeps_ties=engine_class(self.args.rollout).keeps_ties(self.policy.device.type))

    def micro_batches(self, trees: Sequence[Tree]) -> list[PackedBatch]:
        """Return this rank's packed micro-batches of trees of completions, as large as the config allows."""
        limit = self.args.max_tokens_per_micro_batch
        size = self.args.per_device_train_batch_size if limit is None else None
        return list(micro_batches(trees, self.ranks, max_tokens=limit, max_branches=size))

    def summarize(self, updates: Sequence[Update], num_passes: int) -> Metrics:
        """Return, over all ranks, the mean loss of an update, means over all trained tokens, and their number."""
        metrics = MetricSums()
        for update in updates:
            metrics.join(update.metrics.sums)
        micros = [micro for update in updates for micro in update.micro_batches]
        unsampled = sum(micro.num_targets for micro in micros if "sampler_logp" not in micro.per_token)
        counts = self.ranks.sum(
            {
                "loss": sum(read_scalars(dict(enumerate(update.loss for update in updates))).values()),
                "targets": float(sum(micro.num_targets for micro in micros) * num_passes),
                "sequences": float(sum(micro.num_sequences for micro in micros) * num_passes),
                "tokens": count_tokens(micros) * num_passes,
                "unsampled": float(unsampled * num_passes),
            }
        )
        targets = counts["targets"]
        means = metrics.reduce(self.ranks.gather_shares, tokens=targets, sequences=counts["sequences"])
        return means | {
            "sampling/logp_missing": counts["unsampled"] / max(targets, 1.0),
            "tokens/trained": counts["tokens"],
            "loss": counts["loss"] / (len(updates) * num_passes),
        }

    # What the loop calls

    def compute_evaluation(self, rows: Sequence[Prompt]) -> Metrics:
        return self.rollouts.evaluate(rows)

    def saved_parts(self) -> dict[str, Stateful]:
        return super().saved_parts() | {"rollouts": self.rollouts}

    def fingerprint_entries(self) -> dict[str, Any]:
        entries = super().fingerprint_entries() | reward_fingerprint(self.rewards)
        rollout = self.args.rollout
        if engine_class(
            rollout
        ).in_workers:  # which share the groups out by their number, also where the machine gives it
            entries["train.rollout.num_workers"] = count_workers(rollout, this_machine(self.policy.device.type))
        return entries

    def close(self) -> None:
        self.rollouts.close()


def branch_of(completion: Completion, **per_sequence: float | bool) -> Branch:
    """Return a completion as a branch of its prompt, with the sampler's logprobs if it has them."""
    per_token = {} if completion.logprobs is None else {"sampler_logp": completion.logprobs}
    return Branch(completion.token_ids, per_token=per_token, per_sequence=per_sequence, experts=completion.experts)


def split_into_updates(completions: Sequence[tuple[Group, int]], size: int) -> Iterator[list[tuple[Group, list[int]]]]:
    """Yield shares of `size` completions, in order: a share names groups and which of their completions it holds."""
    for start in range(0, len(completions), size):
        share: dict[int, tuple[Group, list[int]]] = {}
        for group, index in completions[start : start + size]:
            share.setdefault(id(group), (group, []))[1].append(index)
        yield list(share.values())


def _refuse_rewards_inside(reward_funcs: RewardFunc | Sequence[RewardFunc], args: OnlineConfig) -> None:
    """Raise ConfigError if a reward is in the run folder that `overwrite_output_dir` clears."""
    if not (args.output_dir and args.overwrite_output_dir) or args.resume_from_checkpoint:
        return
    several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
    funcs: Sequence[Any] = reward_funcs if several else [reward_funcs]  # type: ignore[assignment]
    names = [func for func in funcs if isinstance(func, str)]
    paths = {f"reward_funcs[{place}]": name.rpartition(":")[0] or name for place, name in enumerate(names)}
    refuse_needed_inside(args.output_dir, paths)
