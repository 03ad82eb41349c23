"""Reduce each answer to the few numbers that preference losses read.

Shapes: N target tokens, S answers, B pairs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlqwen.algorithms.losses.reduction import sequence_mean, sequence_sum
from rlqwen.packing.batch import PackedBatch, Tree


@dataclass(slots=True, frozen=True)
class Answers:
    """Hold what losses read of S answers. In data of pairs, each chosen answer is followed by its rejected answer."""

    logp_S: Tensor
    """Log-probability of the answer; with LD-DPO, surplus tokens have a lower weight (see `answer_logps`)."""
    plain_logp_S: Tensor
    """Log-probability of the answer without that weighting."""
    ref_logp_S: Tensor
    """Log-probability under the reference, weighted as `logp_S` is; 0 if there is no reference."""
    lengths_S: Tensor
    """Number of target tokens."""
    labels_S: Tensor
    """Bool: whether the answer is good (in a pair, the chosen one is)."""
    log_weight_S: Tensor
    """Logarithm of the answer's weight; 0 except with WPO."""

    @property
    def good(self) -> "Answers":
        """Return the good answers; in data of pairs, the chosen ones."""
        return self._where(self.labels_S)

    @property
    def bad(self) -> "Answers":
        """Return the bad answers; in data of pairs, the rejected ones."""
        return self._where(~self.labels_S)

    @property
    def log_ratio_S(self) -> Tensor:
        """Return the log of the policy's probability over the reference's."""
        return self.logp_S - self.ref_logp_S

    @property
    def mean_logp_S(self) -> Tensor:
        """Return the mean log-probability per token."""
        return self.plain_logp_S / self.lengths_S.clamp(min=1)

    def _where(self, mask_S: Tensor) -> "Answers":
        return Answers(*(getattr(self, field.name)[mask_S] for field in fields(self)))

    def detached(self, device: torch.device | str) -> "Answers":
        """Return a copy on `device`, without gradient."""
        return Answers(*(getattr(self, field.name).detach().to(device) for field in fields(self)))

    @staticmethod
    def join(parts: Sequence["Answers"]) -> "Answers":
        """Concatenate the answers of several batches."""
        names = [field.name for field in fields(Answers)]
        return Answers(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(slots=True, frozen=True)
class AnswerTotals:
    """Hold counts over the whole update, by which losses and metrics divide."""

    good: int
    bad: int
    good_tokens: int
    """Target tokens of good answers."""
    pairs: int
    """0 if the answers are not in pairs."""

    @property
    def answers(self) -> int:
        """Return the number of all answers."""
        return self.good + self.bad

    @classmethod
    def of(cls, batches: Iterable["PackedBatch | Answers"], *, paired: bool) -> "AnswerTotals":
        """Count over `batches`."""
        good = bad = tokens = 0
        for batch in batches:
            labels_S = batch.labels_S if isinstance(batch, Answers) else batch.per_sequence["label"]
            good += int(labels_S.sum())
            bad += int((~labels_S).sum())
            tokens += int(batch.lengths_S[labels_S].sum())
        return cls(good, bad, tokens, pairs=good if paired else 0)

    @classmethod
    def of_trees(cls, trees: Iterable[Tree], *, paired: bool) -> "AnswerTotals":
        """Count over `trees`, before they are packed."""
        counts = [
            (bool(branch.per_sequence["label"]), count)
            for tree in trees
            for branch, count in zip(tree.branches, tree.target_counts, strict=True)
        ]
        good = sum(label for label, _ in counts)
        tokens = sum(count for label, count in counts if label)
        return cls(good, len(counts) - good, tokens, pairs=good if paired else 0)


def read_answers(
    logp_N: Tensor,
    batch: PackedBatch,
    *,
    ref_logp_S: Tensor | None = None,
    ld_alpha: float | None = None,
    log_sum_sq_probs_N: Tensor | None = None,
) -> Answers:
    """Sum the logprobs of each answer.

    Args:
        logp_N: (N,) logprobs under the policy.
        ref_logp_S: (S,) log-probabilities under the reference, summed with the same `ld_alpha`.
        log_sum_sq_probs_N: (N,) log of the sum over the vocabulary of p^2, for WPO (arXiv 2406.11827). An answer's weight
            is the geometric mean over its tokens of p(token) / sum p^2. This compares the answer with samples of the
            policy, whatever its entropy. No gradient flows through the weight.
    """
    logp_N = logp_N.float()
    plain_logp_S = sequence_sum(logp_N, batch)
    nothing_S = torch.zeros_like(plain_logp_S)
    weight_S = nothing_S
    if log_sum_sq_probs_N is not None:
        weight_S = sequence_mean(logp_N.detach() - log_sum_sq_probs_N, batch)
    return Answers(
        logp_S=plain_logp_S if ld_alpha is None else answer_logps(logp_N, batch, ld_alpha),
        plain_logp_S=plain_logp_S,
        ref_logp_S=nothing_S if ref_logp_S is None else ref_logp_S,
        lengths_S=batch.lengths_S,
        labels_S=batch.per_sequence["label"],
        log_weight_S=weight_S,
    )


def answer_logps(logp_N: Tensor, batch: PackedBatch, ld_alpha: float | None) -> Tensor:
    """Return the (S,) log-probability of each answer.

    With LD-DPO (arXiv 2409.06411), the tokens by which an answer is longer than the other answer of its pair have the
    weight `ld_alpha`, so that length alone makes less of a difference.
    """
    if ld_alpha is None:
        return sequence_sum(logp_N, batch)
    lengths_S = batch.lengths_S.long()
    shared_S = lengths_S.view(len(lengths_S) // 2, 2).amin(dim=1).repeat_interleave(2)
    start_S = lengths_S.cumsum(0) - lengths_S
    position_N = torch.arange(len(logp_N), device=logp_N.device) - start_S[batch.sequence_N]
    return sequence_sum(torch.where(position_N < shared_S[batch.sequence_N], logp_N, ld_alpha * logp_N), batch)
