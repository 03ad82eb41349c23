"""On-policy distillation by policy gradient: a token's advantage is how much likelier the teacher finds it.

Minimizes the reverse KL divergence on the student's own samples, by the teacher's logprob of each sampled token alone.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from rlqwen.algorithms.loss_metrics import token_mean
from rlqwen.algorithms.losses import Totals
from rlqwen.models.loading import load_reference
from rlqwen.packing.batch import Branch, Tree
from rlqwen.trainers.online import Learned, OnlineTrainer, RewardFunc, Update
from rlqwen.types import Group, Prompt


class SampledDistillationTrainer(OnlineTrainer[Any]):
    """Make the tokens likelier that the teacher finds likelier than the student did."""

    algorithm = "sampled_distillation"

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: RewardFunc | Sequence[RewardFunc] = (),
        args: Any = None,
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        peft_config: Any | None = None,
    ) -> None:
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=None,
            callbacks=None,
            peft_config=peft_config,
            reward_processing_classes=None,
            reference=load_reference(args.teacher.path, model, args),
        )

    def learn(self, prompts_P: Sequence[Prompt]) -> Learned:
        groups_P, metrics = self.next_groups(prompts_P)
        update = self._pack(groups_P)
        for micro in update.micro_batches:
            micro = micro.to(self.policy.device)
            teacher_logp = self.policy.reference_logprobs(micro)
            logp, _ = self.policy.logprobs(micro)
            gap = teacher_logp - logp.detach()
            loss = -(self.args.teacher.strength * gap * logp).sum() / update.totals.tokens
            self.optimizer.backward(loss)
            update.add(loss, {"teacher/gap": token_mean(gap)})
        self.update(update.micro_batches)
        return Learned(groups_P, [update], metrics)

    def _pack(self, groups_P: list[Group]) -> Update:
        trees = [
            Tree(group.prompt.token_ids, [Branch(one.token_ids) for one in group.completions if one.token_ids])
            for group in groups_P
        ]
        sizes = [len(branch.token_ids) for tree in trees for branch in tree.branches]
        return Update(self.micro_batches(trees), Totals(tokens=sum(sizes), sequences=len(sizes)))
