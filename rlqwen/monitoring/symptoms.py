"""List the symptoms that a monitor looks for.

A symptom is a function of its section of `watch` and an ObservedStep. It returns a Diagnosis (what is wrong, the likely
cause, and what to change) or None. Symptoms do not count steps: the monitor requires that a symptom lasts.
"""

from collections.abc import Callable
from typing import Any

from rlqwen.monitoring.completion_symptoms import empty, runaway_length
from rlqwen.monitoring.diagnosis import Diagnosis, ObservedStep
from rlqwen.monitoring.policy_symptoms import entropy, kl, mismatch
from rlqwen.monitoring.reward_symptoms import no_signal, reward_failures, zero_reward
from rlqwen.monitoring.update_symptoms import grad_norm, idle, masked, nonfinite, skipped

SYMPTOMS: dict[str, Callable[[Any, ObservedStep], Diagnosis | None]] = {
    function.__name__: function
    for function in (
        nonfinite,
        skipped,
        mismatch,
        entropy,
        kl,
        grad_norm,
        zero_reward,
        no_signal,
        reward_failures,
        runaway_length,
        empty,
        idle,
        masked,
    )
}
"""Name in `watch` -> symptom, in the order in which alerts are raised."""
