"""Train on preferences directly: DPO and its relatives.

Example:
    trainer = DPOTrainer(
        model="Qwen/Qwen3-0.6B",
        args=DPOConfig(beta=0.1),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()

Shapes: N target tokens, S answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlqwen.algorithms.loss_metrics import Metric, MetricSums, read_scalars
from rlqwen.algorithms.losses.preference import (
    Answers,
    AnswerTotals,
    PreferenceLoss,
    answer_logps,
    kto_kl,
    read_answers,
)
from rlqwen.config import DPOConfig
from rlqwen.data import as_rows, load_chat_template, tokenize_preference_examples
from rlqwen.errors import ConfigError, ModelError
from rlqwen.models.loading import load_reference
from rlqwen.models.policy import Policy
from rlqwen.models.reference_cache import (
    ReferenceKey,
    digest_config,
    digest_trees,
    digest_weights,
    read_logprobs,
    write_logprobs,
)
from rlqwen.packing.batch import PackedBatch, Tree
from rlqwen.trainers.base import Trainer
from rlqwen.trainers.micro_batching import add_up, count_tokens, micro_batches
from rlqwen.trainers.preference_trees import (
    PreferenceExample,
    PreferenceExamples,
    add_kl_answers,
    are_pairs,
    balance_warnings,
    to_example,
)
from rlqwen.trainers.run_logger import Metrics

_PROGRESS_AFTER_S = 3.0


class DPOTrainer(Trainer[PreferenceExample, DPOConfig, Policy]):
    """Make good answers likelier than bad ones, measured against a reference."""

    algorithm = "dpo"
    config_class = DPOConfig
    default_best_metric = "eval/loss"

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: DPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: Any = None,
    ) -> None:
        """Take the arguments of TRL's DPOTrainer, with the same meaning.

        Args:
            model: hub id, folder, `builtin:tiny-qwen3`, or a transformers model, which is trained in place.
            ref_model: the reference, which is frozen; None: the model as it is before training.
            train_dataset: a datasets.Dataset or a list of rows: `prompt` (or none, if both answers begin with it),
                `chosen` and `rejected`; for `kto` also `prompt`, `completion` and `label`.
            eval_dataset: the same, never trained on.
            processing_class: the tokenizer; None loads the model's.
            peft_config: a peft.LoraConfig; None trains all weights.
        """
        args = args or DPOConfig()
        reference = _reference(model, ref_model, args, has_adapter=peft_config is not None)
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            reference=reference,
        )
        self.loss = PreferenceLoss(self.args)
        self._check_reference()
        self.note_other_tokens(self.args.ref_model if ref_model is None else ref_model, "ref_model")
        if self.args.chat_template_path is not None:
            self.processing_class.chat_template = load_chat_template(self.args.chat_template_path)
        self._starts_from_reference = not isinstance(reference, nn.Module)
        self._reference_digests: tuple[str, str] | None = None
        if self.args.precompute_ref_log_probs:
            config = self.policy.reference_config
            self._reference_digests = digest_weights(self.policy.reference_weights()), digest_config(config)
        self.load_data(train_dataset, eval_dataset)
        if self.args.precompute_ref_log_probs:
            self.policy.drop_reference()

    def _check_reference(self) -> None:
        if self.args.sync_ref_model and self.policy.has_adapter:
            raise ConfigError("sync_ref_model mixes whole weights, and a model with an adapter trains none of them")
        ours, theirs = self.policy.text_config.vocab_size, self.policy.reference_config.get_text_config().vocab_size
        if ours != theirs:
            raise ModelError(
                f"ref_model has a vocabulary of {theirs} tokens and the model one of {ours}: they must agree"
            )

    def prepare_rows(self, dataset: Any, *, evaluation: bool) -> Sequence[PreferenceExample]:
        tokenized, report = tokenize_preference_examples(as_rows(dataset), self.processing_class, self.args)
        name = "eval" if evaluation else "train"
        self.reports[name] = report
        if "kto" not in self.args.loss_type and not self.args.precompute_ref_log_probs:
            return PreferenceExamples(tokenized)
        rows = [to_example(row) for row in tokenized]
        if "kto" in self.args.loss_type:
            add_kl_answers(rows)
            report.warnings += balance_warnings(rows, self.args)
        if self.args.precompute_ref_log_probs:
            self._precompute_reference(rows, name)
        return rows

    # The algorithm

    def step(self, rows: list[PreferenceExample]) -> Metrics:
        """Make one update on the mean loss of `rows`."""
        batches = list(self._batches([row.answers for row in rows], self.args.per_device_train_batch_size))
        totals = AnswerTotals.of_trees((row.answers for row in rows), paired=are_pairs(rows))
        kl = self._kl(rows, self.args.per_device_train_batch_size)
        if self.args.ranks_pairs and (len(batches) > 1 or self.ranks.data_size > 1):
            metrics = self._backward_in_two_passes(batches, totals)
        else:
            sums: dict[str, Tensor | float] = {}
            collected = MetricSums()
            for micro in batches:
                loss, shares, reported = self.loss(self._answers(micro), totals, kl=kl)
                loss = loss + self.router_loss(micro, batches)
                self.optimizer.backward(loss)
                add_up(sums, {"loss": loss, **shares})
                collected.add(reported)
            found = collected.reduce(self.ranks.gather_shares, tokens=totals.answers, sequences=totals.pairs)
            metrics = self.ranks.sum(read_scalars(sums)) | found
        self.update(batches)
        targets = sum(micro.num_targets for micro in batches)
        tokens = {"tokens/trained": count_tokens(batches), "tokens/targets": float(targets)}
        return metrics | ({} if kl is None else {"kl": kl.item()}) | self.ranks.sum(tokens)

    def _backward_in_two_passes(self, micro_batches: list[PackedBatch], totals: AnswerTotals) -> Metrics:
        """Send back the gradient of a loss that ranks all pairs of the update.

        The first pass finds d loss / d logprobs and keeps no activations; the second sends it back through one
        micro-batch after another. The answers of other ranks are numbers without gradient.
        """
        with self.policy.inference():
            logps = [self.policy.logprobs(micro)[0] for micro in micro_batches]
        for logp_N in logps:
            logp_N.requires_grad_()
        answers = [self._read(logp_N, micro) for logp_N, micro in zip(logps, micro_batches, strict=True)]
        loss, shares, found = self.loss(self._of_all_ranks(Answers.join(answers)), totals)
        added: dict[str, Tensor | float] = {}
        for micro, grad_N in zip(micro_batches, torch.autograd.grad(loss, logps), strict=True):
            share = (self.policy.logprobs(micro)[0] * grad_N).sum()
            balance = self.router_loss(micro, micro_batches)
            self.optimizer.backward(share + balance)
            add_up(added, {"loss": balance})
        metrics = read_scalars({"loss": loss, **shares})
        metrics["loss"] += self.ranks.sum(read_scalars(added)).get("loss", 0.0)
        return metrics | self._reduce(found, totals)

    def _of_all_ranks(self, own: Answers) -> Answers:
        """Return the answers of all ranks in their order; those of this rank keep their gradient."""
        if self.ranks.data_size == 1:
            return own
        parts = self.ranks.gather_shares(own.detached("cpu"))
        mine = self.ranks.data_rank
        return Answers.join(
            [own if share == mine else part.detached(own.logp_S.device) for share, part in enumerate(parts)]
        )

    def _answers(self, micro: PackedBatch) -> Answers:
        """Return the policy's answers, with gradient, beside the reference's."""
        if self.args.use_weighting:
            logp_N, log_sum_sq_probs_N = self.policy.logprobs_and_log_sum_sq_probs(micro)
            return self._read(logp_N, micro, log_sum_sq_probs_N)
        return self._read(self.policy.logprobs(micro)[0], micro)

    def _read(self, logp_N: Tensor, micro: PackedBatch, log_sum_sq_probs_N: Tensor | None = None) -> Answers:
        ref_logp_S = micro.per_sequence.get("ref_logp")
        if self.args.needs_reference and ref_logp_S is None:
            ref_logp_S = answer_logps(self.policy.reference_logprobs(micro), micro, self.args.ld_alpha)
        return read_answers(
            logp_N, micro, ref_logp_S=ref_logp_S, ld_alpha=self.args.ld_alpha, log_sum_sq_probs_N=log_sum_sq_probs_N
        )

    def _kl(self, rows: Sequence[PreferenceExample], batch_size: int) -> Tensor | None:
        """Return KTO's estimate of the KL over all `rows`; None if no loss asks for it."""
        trees = [row.kl_answers for row in rows if row.kl_answers is not None]
        if not trees:
            return None
        with self.policy.inference():
            own = Answers.join([self._answers(micro) for micro in self._batches(trees, batch_size)])
        return kto_kl(self._of_all_ranks(own))

    def compute_evaluation(self, rows: Sequence[PreferenceExample]) -> Metrics:
        """Return the loss and its parts over all `rows` as one batch."""
        size = self.args.per_device_eval_batch_size
        own = Answers.join([self._answers(micro) for micro in self._batches([row.answers for row in rows], size)])
        answers = self._of_all_ranks(own)
        totals = AnswerTotals.of([answers], paired=are_pairs(rows))
        kl = self._kl(rows, size)
        loss, shares, found = self.loss(answers, totals, kl=kl)
        shares |= {} if kl is None else {"kl": kl}
        metrics = read_scalars({"loss": loss, **shares})
        return metrics | self._reduce(found, totals)

    def _reduce(self, found: Mapping[str, Metric], totals: AnswerTotals) -> Metrics:
        """Return the metrics of a loss that has seen the answers of all ranks at once."""
        collected = MetricSums()
        collected.add(found)
        return collected.reduce(lambda own: [own], tokens=totals.answers, sequences=totals.pairs)

    def _batches(self, trees: list[Tree], size: int) -> Iterator[PackedBatch]:
        """Yield this rank's micro-batches of `size` whole trees, or, with a token budget, of as many as it allows."""
        budget = self.args.max_tokens_per_micro_batch
        limit = size * len(trees[0].branches) if budget is None else None  # all rows have one answer, or all have two
        parts = micro_batches(trees, self.ranks, max_tokens=budget, max_branches=limit, divisible=False)
        return (part.to(self.policy.device) for part in parts)

    # The reference, computed once

    def _precompute_reference(self, rows: list[PreferenceExample], name: str) -> None:
        """Fill in the reference's log-probability of every answer, from disk if it is there."""
        assert self._reference_digests is not None
        trees = [tree for row in rows for tree in (row.answers, row.kl_answers) if tree is not None]
        key = ReferenceKey(
            *self._reference_digests,
            answers=digest_trees(trees),
            dtype=str(self.policy.compute_dtype),
            ld_alpha=self.args.ld_alpha,
        )
        logp_A, note = self.ranks.from_main(read_logprobs(key) if self.ranks.is_main else (None, ""))
        if logp_A is None:
            self.logger.note(f"{name}: log-probabilities of the reference: {note}; computing them")
            logp_A = self._reference_logps(trees, name)
            note = write_logprobs(key, logp_A) if self.ranks.is_main else ""
        self.logger.note(f"{name}: log-probabilities of the reference: {note}")
        branches = (branch for tree in trees for branch in tree.branches)
        for branch, logp in zip(branches, logp_A.tolist(), strict=True):
            branch.per_sequence["ref_logp"] = logp

    @torch.no_grad()
    def _reference_logps(self, trees: list[Tree], name: str) -> Tensor:
        """Return the reference's log-probability of each of the trees' A branches, in order: (A,)."""
        if not self.policy.has_reference and (self.state.global_step > 0 or not self._starts_from_reference):
            raise ConfigError(
                "precompute_ref_log_probs has freed the reference, and these rows came later: give them as "
                "eval_dataset to the trainer, or leave precompute_ref_log_probs out"
            )
        size = self.args.per_device_train_batch_size if name == "train" else self.args.per_device_eval_batch_size
        logps = []
        with (
            self.policy.inference(),
            tqdm(
                total=sum(len(tree.branches) for tree in trees) // self.ranks.data_size,
                desc=f"Reference over {name}",
                unit="answer",
                delay=_PROGRESS_AFTER_S,
                disable=None if self.ranks.is_main else True,
            ) as bar,
        ):
            for micro in self._batches(trees, self.args.precompute_ref_batch_size or size):
                # If there is no reference model, the policy as it is before training is the reference.
                has_own = self.policy.has_reference
                logp_N = self.policy.reference_logprobs(micro) if has_own else self.policy.logprobs(micro)[0]
                logps.append(answer_logps(logp_N, micro, self.args.ld_alpha).cpu())
                bar.update(micro.num_sequences)
        return self.ranks.concatenate(torch.cat(logps))


def _reference(
    model: str | nn.Module, ref_model: str | nn.Module | None, args: DPOConfig, *, has_adapter: bool
) -> bool | nn.Module:
    """Return the reference as Policy takes it: a model, or whether the policy's own start is one."""
    if ref_model is not None and args.ref_model is not None:
        raise ConfigError(f"the reference is given twice, as ref_model and as args.ref_model={args.ref_model!r}")
    ref_model = args.ref_model if ref_model is None else ref_model
    if ref_model is None:
        # Without an adapter to switch off, a reference is a copy of all weights, which precomputing makes needless.
        return args.needs_reference and (has_adapter or not args.precompute_ref_log_probs)
    if not args.needs_reference:
        raise ConfigError(f"ref_model is given, but loss_type {', '.join(args.loss_type)} uses no reference")
    return load_reference(ref_model, model, args)
