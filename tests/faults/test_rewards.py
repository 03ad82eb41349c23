"""Inject faults of rewards that tests/rewards does not inject."""

import time

import pytest

from rlqwen.config import ScoringConfig
from rlqwen.rewards import Scorer, build_rewards
from rlqwen.types import Completion, Group, Prompt

TIMEOUT = 6.0
HOSTILE = {
    "power tower": r"\boxed{9^{9^{9^{9}}}}",
    "factorials": r"\boxed{9!!!!!!!!}",
    "long exponent": r"\boxed{2^{99999999999999999999}}",
    "huge integer": r"\boxed{" + "7" * 10**6 + "}",
    "huge formula": r"\boxed{" + "+".join(["x"] * 200_000) + "}",
    "huge text": "the answer is 7 " * 70_000,
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 20_000 + "2" + "}" * 20_000 + "}",
    "nested braces": r"\boxed{" + "{" * 100_000 + "7" + "}" * 100_000 + "}",
    "nested roots": r"\boxed{" + r"\sqrt{" * 5_000 + "7" + "}" * 5_000 + "}",
    "100,000 boxes": r"\boxed{1}" * 100_000,
    "100,000 open boxes": r"\boxed{" * 100_000,
    "sum without end": r"\boxed{\sum_{n=1}^{\infty} \prod_{k=1}^{n} k^{k^{k}}}",
    "full-width digits": r"\boxed{７３}",
    "right to left": "\\boxed{\u202e27}",
    "zero width": "\\boxed{7\u200b\u200b3}",
    "combining marks": "\\boxed{7" + "\u0301" * 50_000 + "}",
    "NUL": "\\boxed{7\x00}",
    "half a surrogate pair": "\\boxed{7\ud800}",
}


@pytest.mark.slow_fault
@pytest.mark.fault(
    "hostile math answers: towers of powers, deep braces, 100,000 boxes, a million digits, Unicode tricks",
    "each graded, or missing, before its deadline; the right answer beside it gets 1",
)
def test_hostile_math_answers_end_at_their_deadline() -> None:
    groups = []
    for number, text in enumerate(HOSTILE.values()):
        completions = [Completion([1], [0.0], "stop", one) for one in (text, r"\boxed{72}")]
        groups.append(Group(Prompt(number, [1], "?", {"solution": "72"}), completions, policy_version=0))
    config = ScoringConfig(timeout=TIMEOUT, max_failure_share=1.0, num_workers=2)
    with Scorer(build_rewards(["accuracy"]), config) as scorer:
        scorer.wait_until_ready()
        started = time.monotonic()
        scorer.score(groups)
    wrong = {
        name: (group.rewards["accuracy"], group.call_statuses["accuracy"])
        for name, group in zip(HOSTILE, groups, strict=True)
        if group.rewards["accuracy"][0] not in (0.0, None) or group.rewards["accuracy"][1] != 1.0
    }
    assert wrong == {}
    timeouts = sum(group.call_statuses["accuracy"].count("timeout") for group in groups)
    assert time.monotonic() - started < 2 * TIMEOUT * (timeouts + 1) + TIMEOUT * len(groups) / 4
