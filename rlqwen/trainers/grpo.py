"""Train by Group Relative Policy Optimization and its relatives, with rollouts from vLLM workers.

Example:
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B", reward_funcs=["accuracy", my_reward], train_dataset=dataset, args=GRPOConfig(beta=0.04)
    )
    trainer.train()

Shapes: P prompts per rollout, G completions per prompt.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.algorithms.advantages import carries_signal, soft_overlong_penalty
from rlqwen.algorithms.losses import GRPOLoss, settings_of
from rlqwen.config import GRPOConfig
from rlqwen.errors import ConfigError
from rlqwen.packing.batch import PackedBatch, Tree
from rlqwen.plugins.kinds import ADVANTAGES
from rlqwen.plugins.named_call import NamedCall
from rlqwen.trainers.arrival import ArrivalTrainer, Count, Share
from rlqwen.trainers.online import Learned, RewardFunc, Update, branch_of, split_into_updates
from rlqwen.trainers.run_logger import Metrics
from rlqwen.types import Group, Prompt


class GRPOTrainer(ArrivalTrainer[GRPOConfig]):
    """Sample a group of completions for each prompt, score them, and make the better ones likelier."""

    algorithm = "grpo"
    config_class = GRPOConfig

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: Any = None,
        reward_processing_classes: Any = None,
    ) -> None:
        """Take the arguments of TRL's GRPOTrainer, with the same meaning.

        Args:
            model: hub id, folder, `builtin:tiny-qwen3`, or a transformers model, which is trained in place.
            reward_funcs: one or several of: a callable of TRL's protocol, a registered name, `package.module:function`,
                `file.py:function`, a sequence-classification model or its path.
            train_dataset: a datasets.Dataset or a list of rows with a `prompt` (text or messages); other columns go to
                the rewards that name them.
            eval_dataset: the same, never trained on.
            processing_class: the tokenizer; None loads the model's.
            peft_config: a peft.LoraConfig; None trains all weights.
            reward_processing_classes: tokenizers of reward models, parallel to `reward_funcs`; None: their own.
        """
        args = args or GRPOConfig()
        if args.sync_ref_model and (peft_config is not None or not args.beta):
            raise ConfigError("sync_ref_model needs a reference copy: beta above 0, and no adapter")
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
            reference=args.beta > 0,
        )
        self.loss = GRPOLoss(self.args)
        self.estimate_advantages = NamedCall.find(
            ADVANTAGES,
            self.args.advantage_estimator,
            inputs=("rewards", "lengths"),
            settings=settings_of(self.args),
            arguments=self.args.advantage_args,
        )

    # The algorithm

    def learn(self, prompts_P: list[Prompt]) -> Learned:
        """Sample a group for each prompt, score it, estimate advantages, and make the clipped updates."""
        metrics: Metrics = {}
        groups_P: list[Group] = []
        if self.trains_on_arrival:
            updates = self.gather_on_arrival(self._arriving(prompts_P, groups_P, metrics))
        else:
            groups_P = list(self._sample(prompts_P, metrics))
            self._assign_advantages(groups_P)
            updates = [self._pack(share) for share in self._shares(groups_P)]
            for micro in (micro for update in updates for micro in update.micro_batches):
                self.add_fixed_logprobs(micro)
        for _ in range(self.args.num_iterations):
            for update in updates:
                self.make_update(update)
        return Learned(groups_P, updates, metrics, num_passes=self.args.num_iterations)

    def _arriving(self, prompts_P: list[Prompt], groups_P: list[Group], metrics: Metrics) -> Iterator[Group]:
        """Yield groups with their advantages as they arrive, and collect them in `groups_P`."""
        for group in self._sample(prompts_P, metrics):
            self._assign_advantages([group])
            groups_P.append(group)
            yield group

    def _sample(self, prompts_P: list[Prompt], metrics: Metrics) -> Iterator[Group]:
        """Yield the scored groups of a step, and add metrics of the draws at the end.

        Dynamic sampling draws until enough groups carry signal, and yields others only in place of those that are missing.
        """
        wanted, num_kept, num_drawn = len(prompts_P), 0, 0
        spare: list[Group] = []
        dynamic = self.args.dynamic_sampling
        for sampling_round in range(self.args.max_sampling_rounds if dynamic else 1):
            for group in self.draw_groups(prompts_P, metrics):
                num_drawn += 1
                has_signal = carries_signal(self._shaped_rewards([group])).item()
                num_kept += int(has_signal)
                if not has_signal:
                    spare.append(group)
                if not dynamic or (has_signal and num_kept <= wanted):
                    yield group
            missing = wanted - num_kept
            if missing <= 0 or not dynamic:
                break
            if sampling_round + 1 < self.args.max_sampling_rounds:
                hit_rate = max(num_kept / num_drawn, 1 / wanted)
                prompts_P = self.stream.take(min(wanted, math.ceil(missing / hit_rate)))
        metrics["groups/no_signal"] = len(spare) / num_drawn
        metrics["groups/sampled"] = float(num_drawn)
        if dynamic:
            yield from spare[: max(wanted - num_kept, 0)]

    def _assign_advantages(self, groups_P: list[Group]) -> None:
        lengths_PG = torch.tensor([[len(one.token_ids) for one in group.completions] for group in groups_P])
        advantages_PG: Tensor = self.estimate_advantages(
            {"rewards": self._shaped_rewards(groups_P), "lengths": lengths_PG}
        )
        for group, advantages_G in zip(groups_P, advantages_PG.tolist(), strict=True):
            group.advantages_G = advantages_G

    def _shaped_rewards(self, groups_P: Sequence[Group]) -> Tensor:
        """Return (P, G) total rewards with the soft overlong penalty, if one is set; NaN for a missing reward."""
        rewards_PG = torch.tensor(
            [[math.nan if reward is None else reward for reward in group.total_rewards_G] for group in groups_P]
        )
        cache, limit = self.args.soft_overlong_cache, self.args.max_completion_length
        if cache is not None:
            rewards_PG += torch.tensor(
                [
                    [soft_overlong_penalty(len(c.token_ids), limit, cache) for c in group.completions]
                    for group in groups_P
                ]
            )
        return rewards_PG

    def accumulate(self, micro: PackedBatch, update: Update) -> None:
        with self.updates.timed():
            micro = micro.to(self.policy.device)
            is_first = "old_logp" not in micro.per_token
            logp_N, entropy_N = self.policy.logprobs(
                micro,
                temperature=self.args.temperature,
                entropy=True,
                truncation=self.truncation if is_first else None,
            )
            loss, metrics = self.loss(logp_N, entropy_N, micro, update.totals)
            loss = loss + self.router_loss(micro, update.micro_batches)
            self.optimizer.backward(loss)
            update.add(loss, metrics)

    # From groups to batches

    def _shares(self, groups_P: list[Group]) -> Iterator[list[tuple[Group, list[int]]]]:
        """Split completions into updates, in order."""
        flat = [(group, index) for group in groups_P for index in range(len(group))]
        return split_into_updates(flat, self.plan.completions_per_update)

    def _pack(self, share: Share) -> Update:
        """Return the micro-batches of a share."""
        count = Count()
        trees = list(self.trees(share, count))
        return Update(self.micro_batches(trees), count.totals)

    def trees(self, share: Share, count: Count) -> Iterator[Tree]:
        """Yield the trees of completions to train on, and count what the loss is divided by.

        Completions without a gradient are left out of the forward but counted; those whose reward is missing are left out
        of both.
        """
        for group, indices in share:
            branches = []
            for index in indices:
                completion, advantage = group.completions[index], group.advantages_G[index]
                if group.total_rewards_G[index] is None:
                    continue
                count.sequences += 1
                if self.args.mask_truncated_completions and completion.is_truncated:
                    continue
                count.tokens += len(completion.token_ids)
                if advantage or self._trains_without_advantage:
                    branches.append(branch_of(completion, advantage=advantage))
            if branches:
                yield Tree(group.prompt.token_ids, branches, group.prompt_experts)

    @property
    def _trains_without_advantage(self) -> bool:
        """Return whether the loss has terms that act on a completion whose advantage is 0."""
        return bool(self.args.beta or self.args.entropy_coef or self.policy.routers.coefficient)

    def add_fixed_logprobs(self, micro: PackedBatch) -> None:
        """Fill in logprobs of the reference, and of the policy before the first update.

        With one update per rollout the latter are those of the training forward, and no second forward is made.
        """
        temperature = self.args.temperature
        with self.updates.timed():
            moved = micro.to(self.policy.device)
            if self.args.beta:
                micro.per_token["ref_logp"] = self.policy.reference_logprobs(moved, temperature=temperature).cpu()
            if self.plan.updates_per_step > 1:
                with self.policy.inference():
                    logp_N, _ = self.policy.logprobs(moved, temperature=temperature, truncation=self.truncation)
                micro.per_token["old_logp"] = logp_N.cpu()
                if "log_kept" in moved.per_token:
                    micro.per_token["log_kept"] = moved.per_token["log_kept"].cpu()
