"""Distill a teacher into a student on the student's own samples.

Example:
    trainer = DistillationTrainer(
        model="Qwen/Qwen3-0.6B", teacher_model="Qwen/Qwen3-8B", train_dataset=dataset, args=DistillationConfig()
    )
    trainer.train()

The student samples completions, the teacher says at each of their tokens how likely every next token is, and the student
moves towards that: dense feedback on what the student really writes (GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543).

Shapes: P prompts per rollout, N tokens of a micro-batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.algorithms.loss_metrics import MetricSums, token_mean
from rlqwen.algorithms.losses import LossCall, Normalizer, settings_of
from rlqwen.config import DistillationConfig
from rlqwen.errors import ConfigError
from rlqwen.models.loading import load_reference
from rlqwen.packing.batch import PackedBatch, Tree
from rlqwen.trainers.arrival import ArrivalTrainer, Count, Share
from rlqwen.trainers.online import Learned, RewardFunc, Update, branch_of
from rlqwen.trainers.run_logger import Metrics
from rlqwen.types import Group, Prompt


class DistillationTrainer(ArrivalTrainer[DistillationConfig]):
    """Sample completions with the student, and lower its KL divergence from the teacher at each of their tokens."""

    algorithm = "distillation"
    config_class = DistillationConfig
    default_best_metric = "eval/kl"

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | nn.Module | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: Any = None,
        reward_funcs: RewardFunc | Sequence[RewardFunc] = (),
        reward_processing_classes: Any = None,
    ) -> None:
        """Load student and teacher.

        Args:
            model: the student: hub id, folder, `builtin:tiny-qwen3`, or a transformers model, which is trained in place.
            teacher_model: the teacher, which is frozen; None: `args.teacher`. It must have the student's tokenizer.
            train_dataset: a datasets.Dataset or a list of rows with a `prompt` (text or messages).
            eval_dataset: the same, never trained on.
            reward_funcs: rewards that are only measured, as for GRPOTrainer.
            peft_config: a peft.LoraConfig; None trains all weights.
        """
        args = args or DistillationConfig()
        if teacher_model is not None and args.teacher is not None:
            raise ConfigError(f"the teacher is given twice, as teacher_model and as args.teacher={args.teacher!r}")
        teacher = args.teacher if teacher_model is None else teacher_model
        if teacher is None:
            raise ConfigError(
                "distillation needs a teacher: give teacher_model, or teacher in the recipe's train section"
            )
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            reward_processing_classes=reward_processing_classes,
            reference=load_reference(teacher, model, args),
        )
        self.note_other_tokens(teacher, "teacher_model")
        settings = settings_of(self.args)
        self.loss = LossCall(
            self.args.loss_type, inputs=("kl", "lengths", "sequence"), settings=settings, arguments=self.args.loss_args
        )
        self.normalizer = Normalizer(self.args.loss_normalizer, settings)

    def learn(self, prompts_P: list[Prompt]) -> Learned:
        """Sample completions for each prompt, and make one update towards the teacher on their tokens."""
        metrics: Metrics = {}
        groups_P: list[Group] = []
        arriving = self._arriving(prompts_P, groups_P, metrics)
        if self.trains_on_arrival:
            [update] = self.gather_on_arrival(arriving)
        else:
            update = self._pack(list(arriving))
        self.make_update(update)
        return Learned(groups_P, [update], metrics)

    def _arriving(self, prompts_P: list[Prompt], groups_P: list[Group], metrics: Metrics) -> Iterator[Group]:
        """Yield groups as they arrive, and collect them in `groups_P`."""
        for group in self.draw_groups(prompts_P, metrics):
            groups_P.append(group)
            yield group

    def accumulate(self, micro: PackedBatch, update: Update) -> None:
        with self.updates.timed():
            micro = micro.to(self.policy.device)
            kl_N = self.policy.kl_to_reference(micro, temperature=self.args.temperature)
            loss_N, found = self.loss({"kl": kl_N, "lengths": micro.lengths_S, "sequence": micro.sequence_N})
            loss = (loss_N * self.normalizer(micro, update.totals)).sum()
            loss = loss + self.router_loss(micro, update.micro_batches)
            self.optimizer.backward(loss)
            update.add(loss, found | {"kl": token_mean(kl_N)})

    def compute_evaluation(self, rows: Sequence[Prompt]) -> Metrics:
        """Return the KL from the teacher on completions sampled as in training, their lengths, and rewards if there are any."""
        groups = self.rollouts.sample_evaluation(rows)
        collected, update = MetricSums(), self._pack(groups)
        for micro in update.micro_batches:
            kl_N = self.policy.kl_to_reference(micro.to(self.policy.device), temperature=self.args.temperature)
            collected.add({"kl": token_mean(kl_N)})
        totals = update.totals
        kl = collected.reduce(self.ranks.gather_shares, tokens=totals.tokens, sequences=totals.sequences)
        metrics = self.describe(groups) | kl
        del metrics["tokens/generated"]
        return metrics

    def describe(self, groups_P: Sequence[Group]) -> Metrics:
        """Return means over the completions, without those of rewards if there are none."""
        metrics = super().describe(groups_P)
        without = ("reward/", "groups/no_signal")
        return metrics if self.rewards else {key: v for key, v in metrics.items() if not key.startswith(without)}

    def _pack(self, groups_P: Sequence[Group]) -> Update:
        """Return the micro-batches of all completions that have a token."""
        count = Count()
        trees = list(self.trees(((group, list(range(len(group)))) for group in groups_P), count))
        return Update(self.micro_batches(trees), count.totals)

    def trees(self, share: Share, count: Count) -> Iterator[Tree]:
        """Yield the trees of completions that have a token, and count what the loss is divided by."""
        for group, indices in share:
            branches = [branch_of(group.completions[one]) for one in indices if group.completions[one].token_ids]
            count.tokens += sum(len(branch.token_ids) for branch in branches)
            count.sequences += len(branches)
            if branches:
                yield Tree(group.prompt.token_ids, branches, group.prompt_experts)
