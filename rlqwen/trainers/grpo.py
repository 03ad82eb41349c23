"""Train by Group Relative Policy Optimization and its relatives, with rollouts from vLLM workers.

Example:
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B", reward_funcs=["accuracy", my_reward], train_dataset=dataset, args=GRPOConfig(beta=0.04)
    )
    trainer.train()

Shapes: P prompts per rollout, G completions per prompt.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.algorithms.advantages import carries_signal, soft_overlong_penalty
from rlqwen.algorithms.losses import GRPOLoss, Totals, settings_of
from rlqwen.config import GRPOConfig
from rlqwen.errors import ConfigError
from rlqwen.packing.batch import Tree
from rlqwen.plugins.kinds import ADVANTAGES
from rlqwen.plugins.named_call import NamedCall
from rlqwen.rollout.sampler import describe_groups
from rlqwen.trainers.online import OnlineTrainer, RewardFunc, Update, branch_of, split_into_updates
from rlqwen.trainers.run_logger import Metrics
from rlqwen.types import Group, Prompt


class GRPOTrainer(OnlineTrainer[GRPOConfig]):
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

    def step(self, prompts_P: list[Prompt]) -> Metrics:
        """Sample a group for each prompt, score it, estimate advantages, and make the clipped updates."""
        groups_P, metrics = self._sample(prompts_P)
        metrics |= self.rollouts.scoring_metrics()
        self._assign_advantages(groups_P)
        started = time.monotonic()
        updates = [self._pack(share) for share in self._shares(groups_P)]
        self._add_fixed_logprobs(updates)
        for _ in range(self.args.num_iterations):
            for update in updates:
                self._update(update)
        self.weights_changed()
        self.refresh_reference(self.args, self.state.global_step - self.plan.updates_per_step)
        self.rollouts.log_completions(groups_P)
        return (
            metrics
            | describe_groups(groups_P)
            | self.summarize(updates, self.args.num_iterations)
            | {"time/train": time.monotonic() - started}
        )

    def _sample(self, prompts_P: list[Prompt]) -> tuple[list[Group], Metrics]:
        """Return scored groups and metrics of the draws; dynamic sampling draws until enough groups carry signal."""
        wanted = len(prompts_P)
        kept: list[Group] = []
        spare: list[Group] = []
        metrics: Metrics = {}
        for sampling_round in range(self.args.max_sampling_rounds if self.args.dynamic_sampling else 1):
            groups, drawn = self.next_groups(prompts_P)
            metrics = {key: metrics.get(key, 0.0) + value for key, value in drawn.items()}
            signal_P = carries_signal(self._shaped_rewards(groups)).tolist()
            kept += [group for group, signal in zip(groups, signal_P, strict=True) if signal]
            spare += [group for group, signal in zip(groups, signal_P, strict=True) if not signal]
            missing = wanted - len(kept)
            if missing <= 0 or not self.args.dynamic_sampling:
                break
            if sampling_round + 1 < self.args.max_sampling_rounds:
                hit_rate = max(len(kept) / (len(kept) + len(spare)), 1 / wanted)
                prompts_P = self.stream.take(min(wanted, math.ceil(missing / hit_rate)))
        metrics["groups/no_signal"] = len(spare) / (len(kept) + len(spare))
        metrics["groups/sampled"] = float(len(kept) + len(spare))
        return (kept + spare)[:wanted] if self.args.dynamic_sampling else groups, metrics

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

    def _update(self, update: Update) -> None:
        """Make one optimizer update."""
        for micro in update.micro_batches:
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
        self.update(update.micro_batches)

    # From groups to batches

    def _shares(self, groups_P: list[Group]) -> Iterator[list[tuple[Group, list[int]]]]:
        """Split completions into updates, in order."""
        flat = [(group, index) for group in groups_P for index in range(len(group))]
        return split_into_updates(flat, self.plan.completions_per_update)

    def _pack(self, share: list[tuple[Group, list[int]]]) -> Update:
        """Return the micro-batches of a share.

        Completions without a gradient are left out of the forward but counted in the totals; those whose reward is
        missing are left out of both.
        """
        trees, tokens, sequences = [], 0, 0
        for group, indices in share:
            branches = []
            for index in indices:
                completion, advantage = group.completions[index], group.advantages_G[index]
                if group.total_rewards_G[index] is None:
                    continue
                sequences += 1
                if self.args.mask_truncated_completions and completion.is_truncated:
                    continue
                tokens += len(completion.token_ids)
                if advantage or self._trains_without_advantage:
                    branches.append(branch_of(completion, advantage=advantage))
            if branches:
                trees.append(Tree(group.prompt.token_ids, branches, group.prompt_experts))
        return Update(self.micro_batches(trees), Totals(tokens=tokens, sequences=sequences))

    @property
    def _trains_without_advantage(self) -> bool:
        """Return whether the loss has terms that act on a completion whose advantage is 0."""
        return bool(self.args.beta or self.args.entropy_coef or self.policy.routers.coefficient)

    def _add_fixed_logprobs(self, updates: list[Update]) -> None:
        """Fill in logprobs of the reference, and of the policy before the first update.

        With one update per rollout the latter are those of the training forward, and no second forward is made.
        """
        temperature = self.args.temperature
        for update in updates:
            for micro in update.micro_batches:
                moved = micro.to(self.policy.device)
                if self.args.beta:
                    micro.per_token["ref_logp"] = self.policy.reference_logprobs(moved, temperature=temperature).cpu()
                if self.plan.updates_per_step > 1:
                    with self.policy.inference():
                        logp_N, _ = self.policy.logprobs(moved, temperature=temperature, truncation=self.truncation)
                    micro.per_token["old_logp"] = logp_N.cpu()
                    if "log_kept" in moved.per_token:
                        micro.per_token["log_kept"] = moved.per_token["log_kept"].cpu()
