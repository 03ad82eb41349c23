"""DPO and its relatives: pure functions of answers' log-probabilities.

answers = read_answers(logp_N, batch, ref_logp_S=ref_logp_S)
loss, metrics = preference_loss(answers, config, AnswerTotals.of([batch], paired=True))
"""

from rlqwen.algorithms.losses.preference.answers import Answers, AnswerTotals, answer_logps, read_answers
from rlqwen.algorithms.losses.preference.loss import kto_kl, preference_loss

__all__ = ["AnswerTotals", "Answers", "answer_logps", "kto_kl", "preference_loss", "read_answers"]
