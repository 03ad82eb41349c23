"""Reward modelling: a model learns to give the better of two answers the higher number.

Example:
    trainer = RewardTrainer(model="Qwen/Qwen3-0.6B", train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"))
    trainer.train()

The model that it leaves loads with AutoModelForSequenceClassification, and its folder can be named as a reward.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.algorithms.loss_metrics import Metric, MetricSums, add_on_device
from rlqwen.algorithms.losses import LossCall, settings_of
from rlqwen.config import RewardConfig
from rlqwen.data import PreferenceRow, as_rows, load_chat_template, tokenize_reward_rows
from rlqwen.distributed import pick_device
from rlqwen.errors import ModelError
from rlqwen.models.adapters import reads_base
from rlqwen.models.critic import ScalarModel
from rlqwen.models.loading import load_scalar_model
from rlqwen.packing.batch import Branch, PackedBatch, Tree
from rlqwen.trainers.base import Trainer
from rlqwen.trainers.micro_batching import count_tokens, micro_batches
from rlqwen.trainers.run_logger import Metrics


class RewardTrainer(Trainer[PreferenceRow, RewardConfig, ScalarModel]):
    """Learn a reward from chosen and rejected answers (Bradley-Terry)."""

    algorithm = "reward"
    config_class = RewardConfig
    default_best_metric = "eval/rewards/accuracies"

    def __init__(
        self,
        model: str | nn.Module,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: Any = None,
    ) -> None:
        """TRL's signature and meaning.

        Args:
            model: hub id, folder, `builtin:tiny-qwen3`, or a sequence-classification model of one label, which is
                trained in place. A causal language model given by name gets a new head.
            train_dataset: a datasets.Dataset or a list of rows with `chosen` and `rejected`, and perhaps `prompt` and
                `margin`; see rlqwen.data.formats for the forms.
            eval_dataset: the same, never trained on.
            processing_class: the tokenizer; None loads the model's.
            peft_config: a peft.LoraConfig; the head is trained whole beside the adapter. None trains all weights.
        """
        super().__init__(
            model,
            args or RewardConfig(),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        if self.args.chat_template_path is not None:
            self.processing_class.chat_template = load_chat_template(self.args.chat_template_path)
        # The saved model finds a sequence's last token by looking for padding.
        self.policy.base_model.config.pad_token_id = self.processing_class.pad_token_id
        self.loss = LossCall(
            self.args.loss_type,
            inputs=("chosen", "rejected", "margin"),
            settings=settings_of(self.args),
            arguments=self.args.loss_args,
        )
        self.load_data(train_dataset, eval_dataset)

    def load_policy(self, model: str | nn.Module, *, peft_config: Any, reference: bool | nn.Module) -> ScalarModel:
        if isinstance(model, str):
            model, _ = load_scalar_model(model, self.args, in_parts=not reads_base(peft_config))
        else:
            config: Any = model.config
            if config.num_labels != 1:
                raise ModelError(f"a reward model has one label, but this one has num_labels={config.num_labels}")
        return ScalarModel(
            model,
            self.args,
            peft_config=peft_config,
            device=pick_device(self.args.use_cpu),
            sequence=self.ranks.sequence,
        )

    def prepare_rows(self, dataset: Any, *, evaluation: bool) -> Sequence[PreferenceRow]:
        rows, report = tokenize_reward_rows(as_rows(dataset), self.processing_class, self.args)
        self.reports["eval" if evaluation else "train"] = report
        return rows

    def step(self, rows: list[PreferenceRow]) -> Metrics:
        """Make one update on the mean loss of the pairs in `rows`."""
        batches = list(self._micro_batches(rows, self.args.per_device_train_batch_size))
        total: Tensor | float = 0.0
        metrics = MetricSums()
        for micro in batches:
            loss, found = self._loss(micro, len(rows))
            loss = loss + self.router_loss(micro, batches)
            self.optimizer.backward(loss)
            total = add_on_device(total, loss * len(rows))
            metrics.add(found)
        self.update(batches)
        tokens = self.ranks.sum({"tokens/trained": count_tokens(batches)})
        return self._means(total, metrics, len(rows)) | tokens

    def compute_evaluation(self, rows: Sequence[PreferenceRow]) -> Metrics:
        """Return the mean loss, the share of pairs that are ranked right, and the mean rewards of either side."""
        total: Tensor | float = 0.0
        metrics = MetricSums()
        for micro in self._micro_batches(rows, self.args.per_device_eval_batch_size):
            loss, found = self._loss(micro, len(rows))
            total = add_on_device(total, loss * len(rows))
            metrics.add(found)
        return self._means(total, metrics, len(rows))

    def _means(self, total: Tensor | float, metrics: MetricSums, num_pairs: int) -> Metrics:
        """Return means over the pairs of all ranks."""
        means = metrics.reduce(self.ranks.gather_shares, tokens=num_pairs, sequences=num_pairs)
        return means | {"loss": self.ranks.sum({"loss": float(total)})["loss"] / num_pairs}

    def _loss(self, micro: PackedBatch, num_pairs: int) -> tuple[Tensor, dict[str, Metric]]:
        """Return the micro-batch's share of the update's loss, and metrics."""
        micro = micro.to(self.policy.device)
        scores_S = self.policy.scores(micro)
        loss_B, metrics = self.loss(
            {"chosen": scores_S[::2], "rejected": scores_S[1::2], "margin": micro.per_sequence["margin"][::2]}
        )
        return loss_B.sum() / max(num_pairs, 1.0), metrics

    def _micro_batches(self, rows: Sequence[PreferenceRow], size: int) -> Iterator[PackedBatch]:
        """Yield this rank's packed pairs, chosen before rejected."""
        limit = self.args.max_tokens_per_micro_batch
        return micro_batches(
            [self._tree(row) for row in rows],
            self.ranks,
            max_tokens=limit,
            max_branches=2 * size if limit is None else None,
            divisible=False,
        )

    def _tree(self, row: PreferenceRow) -> Tree:
        """Return both sides without padding tokens at their end: transformers takes the score at the last other token."""
        pad = self.processing_class.pad_token_id
        chosen, rejected = (_without_tail(side.token_ids, pad) for side in (row.chosen, row.rejected))
        margin: dict[str, float | bool] = {"margin": row.margin or 0.0}
        return Tree(row.prompt_ids, [Branch(side, per_sequence=margin) for side in (chosen, rejected)])


def _without_tail(token_ids: list[int], token_id: int | None) -> list[int]:
    end = len(token_ids)
    while end and token_ids[end - 1] == token_id:
        end -= 1
    return token_ids[:end]
