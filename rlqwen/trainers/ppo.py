"""Train by proximal policy optimization, with a critic, and rewards from functions, models or both.

Example:
    trainer = PPOTrainer(
        model="runs/sft/final", reward_funcs=["accuracy", "models/reward"], train_dataset=dataset, args=PPOConfig()
    )
    trainer.train()

Shapes: P prompts per rollout, N tokens and S completions of a micro-batch.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.algorithms.advantages import gae, token_rewards, whiten
from rlqwen.algorithms.kl_controller import KLController
from rlqwen.algorithms.loss_metrics import Metric
from rlqwen.algorithms.losses import PPOPolicyLoss, Totals, kl_divergence, ppo_value_loss
from rlqwen.config import PPOConfig
from rlqwen.distributed import ParameterGroup
from rlqwen.errors import ConfigError
from rlqwen.models.adapters import reads_base
from rlqwen.models.critic import Critic, ScalarModel, ValueHead
from rlqwen.models.hub import check_vocabulary
from rlqwen.models.loading import load_reference, load_scalar_model
from rlqwen.models.reference_cache import digest_weights
from rlqwen.packing.batch import PackedBatch, Tree
from rlqwen.trainers.checkpointer import Saveable, Stateful
from rlqwen.trainers.online import Learned, OnlineTrainer, RewardFunc, Update, branch_of, split_into_updates
from rlqwen.trainers.run_logger import Metrics
from rlqwen.types import Group, Prompt

CRITIC_FOLDER = "critic"


class PPOTrainer(OnlineTrainer[PPOConfig]):
    """Sample completions, estimate by a critic which of their tokens did better than expected, and make those likelier."""

    algorithm = "ppo"
    config_class = PPOConfig

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: RewardFunc | Sequence[RewardFunc] = (),
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: Any = None,
        reward_processing_classes: Any = None,
        ref_model: str | nn.Module | None = None,
        reward_model: str | nn.Module | None = None,
        value_model: str | nn.Module | None = None,
    ) -> None:
        """Take the arguments of GRPOTrainer, and by keyword those of TRL's PPOTrainer.

        Args:
            model: hub id, folder, `builtin:tiny-qwen3`, or a transformers model, which is trained in place.
            reward_funcs: one or several, as for GRPOTrainer: callables, names, reward models or their paths.
            peft_config: a peft.LoraConfig; a separate critic gets the same adapter, and its head is trained whole.
            ref_model: the reference of the KL, which is frozen; None: the model as it is before training.
            reward_model: one more reward, under TRL's name for it.
            value_model: a sequence-classification model of one label, or its path; None: as `args.critic` says.
        """
        args = args or PPOConfig()
        several: list[Any] = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        rewards = several + ([] if reward_model is None else [reward_model])
        if ref_model is not None and not args.kl_coef:
            raise ConfigError("ref_model is given, but kl_coef is 0, so nothing would be measured against it")
        if not rewards:
            raise ConfigError("PPO needs something to learn from: give reward_funcs, or reward_model")
        super().__init__(
            model,
            rewards,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            reward_processing_classes=reward_processing_classes,
            reference=args.kl_coef > 0 if ref_model is None else load_reference(ref_model, model, args),
        )
        self.note_other_tokens(ref_model, "ref_model")
        self.note_other_tokens(value_model or args.critic.path, "value_model")
        self.loss = PPOPolicyLoss(self.args)
        self.critic = self._build_critic(value_model, peft_config)
        self.kl = KLController(args.kl_coef, target=args.kl_target, horizon=args.kl_horizon)

    def _build_critic(self, model: str | nn.Module | None, peft_config: Any) -> Critic:
        config = self.args.critic
        if config.kind == "head":
            if model is not None:
                raise ConfigError("value_model is for a separate critic: leave it out, or set critic.kind to 'model'")
            size = self.policy.text_config.hidden_size
            return ValueHead(
                size, train_trunk=config.train_trunk, device=self.policy.device, sequence=self.ranks.sequence
            )
        has_head = True
        if not isinstance(model, nn.Module):
            name = model or config.path or self.workers_folder
            model, has_head = load_scalar_model(name, self.args, in_parts=not reads_base(peft_config))
        check_vocabulary(self.processing_class, model.config, "value_model")
        critic = ScalarModel(
            model, self.args, peft_config=peft_config, device=self.policy.device, sequence=self.ranks.sequence
        )
        if not has_head:
            critic.zero_head()
        return critic

    def parameter_groups(self) -> list[ParameterGroup]:
        rate = self.args.learning_rate if self.args.critic.learning_rate is None else self.args.critic.learning_rate
        return [
            *super().parameter_groups(),
            ParameterGroup("critic", self.critic.trained_parameters, rate, self.critic.trained_names, self.critic.root),
        ]

    # The algorithm

    def learn(self, prompts_P: list[Prompt]) -> Learned:
        """Sample and score, give every token its advantage and return, and make the clipped updates."""
        groups_P, metrics = self.next_groups(prompts_P)
        order = random.Random(f"{self.args.seed}/{self.rollouts.num_draws}")
        updates = [self._pack(share) for share in self._mini_batches(groups_P, order)]
        with self.updates.timed():
            self._add_fixed_estimates(updates)
        metrics |= self._assign_advantages([micro for update in updates for micro in update.micro_batches])
        for _ in range(self.args.num_ppo_epochs):
            for update in order.sample(updates, len(updates)):
                self._update(update)
        metrics["critic/grad_norm"] = self.updates.last.grad_norms["critic"]
        return Learned(groups_P, updates, metrics, num_passes=self.args.num_ppo_epochs)

    @torch.no_grad()
    def _add_fixed_estimates(self, updates: Sequence[Update]) -> None:
        """Fill in logprobs of policy and reference, and the critic's values, as they are before the first update."""
        temperature = self.args.temperature
        for micro in (micro for update in updates for micro in update.micro_batches):
            moved = micro.to(self.policy.device)
            with self.policy.inference():
                logp_N, _, hidden_NC = self.policy.logprobs_and_hidden(
                    moved, temperature=temperature, truncation=self.truncation
                )
                micro.per_token["old_logp"] = logp_N.cpu()
                if "log_kept" in moved.per_token:
                    micro.per_token["log_kept"] = moved.per_token["log_kept"].cpu()
                micro.per_token["old_value"] = self.critic.values(moved, hidden_NC).cpu()
            if self.args.kl_coef:
                micro.per_token["ref_logp"] = self.policy.reference_logprobs(moved, temperature=temperature).cpu()

    def _assign_advantages(self, micros: Sequence[PackedBatch]) -> Metrics:
        """Fill in advantages and returns of the whole rollout, and return metrics of them.

        Every rank computes those of all ranks, and keeps its own.
        """
        if not micros:
            return {"kl_coef": self.kl.coef}
        names = ["old_value", "old_logp", *(["ref_logp"] if self.args.kl_coef else [])]
        own = {name: torch.cat([micro.per_token[name] for micro in micros]) for name in names}
        own["length"] = torch.cat([micro.lengths_S for micro in micros])
        own["reward"] = torch.cat([micro.per_sequence["reward"] for micro in micros])
        by_share = self.ranks.gather_shares(own)
        joined = {name: torch.cat([part[name] for part in by_share]) for name in own}
        lengths_S, values_N = joined["length"], joined["old_value"]
        kl_N = torch.zeros_like(values_N)
        if self.args.kl_coef:
            kl_N = kl_divergence(joined["old_logp"], joined["ref_logp"], self.args.kl_estimator)
        in_reward = self.kl.coef if self.args.kl_penalty == "reward" else 0.0
        rewards_N = token_rewards(joined["reward"], kl_N, lengths_S, kl_coef=in_reward)
        if self.args.whiten_rewards:
            rewards_N = whiten(rewards_N, shift_mean=False)
        advantages_N, returns_N = gae(rewards_N, values_N, lengths_S, gamma=self.args.gamma, lam=self.args.lam)
        metrics = {
            "kl": kl_N.mean().item(),
            "kl/completion": kl_N.sum().item() / len(lengths_S),
            "kl_coef": self.kl.coef,
            "advantage/std": advantages_N.std(correction=0).item(),
            "critic/value_mean": values_N.mean().item(),
            "critic/return_mean": returns_N.mean().item(),
            "critic/explained_variance": explained_variance(values_N, returns_N),
        }
        if self.args.whiten_advantages:
            advantages_N = whiten(advantages_N)
        before = sum(len(part["old_value"]) for part in by_share[: self.ranks.data_rank])
        mine = slice(before, before + len(own["old_value"]))
        sizes = [micro.num_targets for micro in micros]
        parts = zip(micros, advantages_N[mine].split(sizes), returns_N[mine].split(sizes), strict=True)
        for micro, advantage_N, return_N in parts:
            micro.per_token["advantage"], micro.per_token["return"] = advantage_N, return_N
        self.kl.observe(metrics["kl/completion"], len(lengths_S))
        return metrics

    def _update(self, update: Update) -> None:
        """Make one optimizer update; while the critic warms up, of the critic alone."""
        critic_only = self.rollouts.num_draws <= self.args.critic.warmup_rollouts
        with self.updates.timed():
            for micro in update.micro_batches:
                self._accumulate(micro, update, critic_only=critic_only)
        self.update(update.micro_batches)

    def _accumulate(self, micro: PackedBatch, update: Update, *, critic_only: bool) -> None:
        micro = micro.to(self.policy.device)
        logp_N, entropy_N, hidden_NC = self.policy.logprobs_and_hidden(
            micro, temperature=self.args.temperature, entropy=True
        )
        values_N = self.critic.values(micro, hidden_NC.detach() if critic_only else hidden_NC)
        value_loss, value_metrics = ppo_value_loss(values_N, micro, self.args, update.totals)
        policy_loss, metrics = self.loss(logp_N, entropy_N, micro, update.totals, kl_coef=self.kl.coef)
        balance = self.router_loss(micro, update.micro_batches)
        loss = self.args.vf_coef * value_loss + (0.0 if critic_only else policy_loss + balance)
        if isinstance(self.critic, ScalarModel):
            loss = loss + self.router_loss(micro, update.micro_batches, self.critic)
        self.optimizer.backward(loss)
        shares = {
            "loss/policy": self._share(policy_loss, update.totals),
            "loss/value": self._share(value_loss, update.totals),
        }
        update.add(loss, value_metrics | metrics | shares)

    @staticmethod
    def _share(loss: Tensor, totals: Totals) -> Metric:
        """Report a share of an update's mean loss, multiplied by the update's tokens, because the mean divides by them."""
        return Metric(loss.detach().double() * totals.tokens, "token_mean")

    # From groups to batches

    def _mini_batches(self, groups_P: Sequence[Group], order: random.Random) -> Iterator[list[tuple[Group, list[int]]]]:
        flat = [(group, index) for group in groups_P for index in range(len(group))]
        if self.args.num_mini_batches > 1:
            order.shuffle(flat)
        return split_into_updates(flat, self.plan.completions_per_update)

    def _pack(self, share: Sequence[tuple[Group, list[int]]]) -> Update:
        """Return the micro-batches of a share; completions without a reward or without tokens are left out."""
        trees = []
        for group, indices in share:
            branches = [
                branch_of(group.completions[index], reward=self._score(group, index))
                for index in indices
                if group.total_rewards_G[index] is not None and group.completions[index].token_ids
            ]
            if branches:
                trees.append(Tree(group.prompt.token_ids, branches, group.prompt_experts))
        tokens = sum(len(branch.token_ids) for tree in trees for branch in tree.branches)
        sequences = sum(len(tree.branches) for tree in trees)
        return Update(self.micro_batches(trees), Totals(tokens=tokens, sequences=sequences))

    def _score(self, group: Group, index: int) -> float:
        penalty = self.args.missing_eos_penalty or 0.0
        return (group.total_rewards_G[index] or 0.0) - (penalty if group.completions[index].is_truncated else 0.0)

    # What a checkpoint holds

    def saved_models(self) -> dict[str, Saveable]:
        return super().saved_models() | {CRITIC_FOLDER: self.critic}

    def saved_parts(self) -> dict[str, Stateful]:
        return super().saved_parts() | {"kl": self.kl}

    def fingerprint_entries(self) -> dict[str, Any]:
        weights = dict(zip(self.critic.trained_names, self.critic.trained_parameters, strict=True))
        return super().fingerprint_entries() | {"critic.weights": digest_weights(weights)}


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """Return the share of the returns' variance that the values predict: 1 is perfect, 0 no better than their mean."""
    variance = returns_N.var(correction=0)
    return (1 - (returns_N - values_N).var(correction=0) / variance.clamp(min=1e-12)).item()
