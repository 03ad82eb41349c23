"""Test pass@k, majority votes and the answers that vote."""

import pytest

from rlqwen.evaluation.metrics.answer_extraction import final_answer
from rlqwen.evaluation.metrics.pass_at_k import majority_right, pass_at_k, reward_metrics, sample_counts
from rlqwen.types import Completion, Group, Prompt


def scored(texts: list[str], values: list[float | None]) -> Group:
    completions = [Completion([1], [0.0], "stop", text) for text in texts]
    return Group(Prompt(0, [1], "?"), completions, policy_version=0, rewards={"accuracy": values})


def test_pass_at_k_is_the_unbiased_estimator() -> None:
    # 1 - C(3, 2) / C(5, 2) = 1 - 3/10
    assert pass_at_k(num_samples=5, num_right=2, k=2) == pytest.approx(0.7)
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert (pass_at_k(5, 0, 3), pass_at_k(5, 3, 3), pass_at_k(5, 5, 5)) == (0.0, 1.0, 1.0)


def test_majority_is_the_most_frequent_answer_or_the_first_of_equals() -> None:
    assert majority_right(["4", "5", "4"], [1.0, 0.0, 1.0]) == 1.0
    assert majority_right(["5", "4", "5"], [0.0, 1.0, 0.0]) == 0.0
    assert majority_right(["5", "4"], [0.0, 1.0]) == 0.0
    assert majority_right(["4", "4"], [1.0, 0.0]) == 0.5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so \boxed{1,234.50}", "1234.5"),
        (r"cut off \boxed{12", "12"),
        ("<answer>a</answer> or <answer> Blue  Sky. </answer>", "blue sky"),
        ("16 - 9 = 7, hence\n#### 7.0", "7"),
        ("2 + 2 makes 4, as 1 + 3 does: $1,004.", "1004"),
        ("no number", "no number"),
    ],
)
def test_final_answer_normalizes_the_answer_that_votes(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_metrics_of_a_binary_reward() -> None:
    groups = [
        scored(["4", "4", "5", "6"], [1.0, 1.0, 0.0, 0.0]),
        scored(["1", "2", "3", "3"], [1.0, 0.0, 0.0, 0.0]),
    ]
    metrics = reward_metrics(groups, "accuracy")
    assert (metrics.mean, metrics.missing, metrics.majority) == (3 / 8, 0, 0.5)
    # pass@2: 1 - C(2,2)/C(4,2) = 5/6 and 1 - C(3,2)/C(4,2) = 1/2
    assert metrics.pass_at == pytest.approx({1: 3 / 8, 2: (5 / 6 + 1 / 2) / 2, 4: 1.0})
    assert sample_counts(6) == [1, 2, 4, 6]


def test_missing_rewards_are_left_out_and_do_not_count_as_wrong() -> None:
    groups = [scored(["4", "9"], [1.0, None]), scored(["1", "2"], [None, None]), scored(["5", "5"], [0.0, 0.0])]
    metrics = reward_metrics(groups, "accuracy")
    assert (metrics.mean, metrics.missing, metrics.majority) == (1 / 3, 3, 0.5)
    # Only the last prompt has two values to draw from.
    assert metrics.pass_at == {1: 0.5, 2: 0.0}


def test_a_graded_reward_has_only_a_mean() -> None:
    metrics = reward_metrics([scored(["a", "b"], [0.25, 0.75])], "accuracy")
    assert (metrics.mean, metrics.pass_at, metrics.majority) == (0.5, None, None)
    empty = reward_metrics([scored(["a"], [None])], "accuracy")
    assert (empty.mean, empty.missing, empty.pass_at) == (None, 1, None)
