"""Define the losses of DPO and its relatives: pure functions of the log-probabilities of answers.

Example:
    answers = read_answers(logp_N, batch, ref_logp_S=ref_logp_S)
    loss, shares, metrics = PreferenceLoss(config)(answers, AnswerTotals.of([batch], paired=True))
"""

from rlqwen.algorithms.losses.preference.answers import Answers, AnswerTotals, answer_logps, read_answers
from rlqwen.algorithms.losses.preference.loss import PreferenceLoss, kto_kl

__all__ = ["AnswerTotals", "Answers", "PreferenceLoss", "answer_logps", "kto_kl", "read_answers"]
