import pickle
from typing import Any

import pytest
from rlqwen_rewards import get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment
from rlqwen_rewards.cosine_length import CosineLength
from rlqwen_rewards.length import Length
from rlqwen_rewards.repetition import Repetition
from rlqwen_rewards.soft_overlong import SoftOverlong
from trl import rewards as trl_rewards

from tests.narrowing import present


def ids(*lengths: int) -> list[list[int]]:
    return [[1] * length for length in lengths]


def test_length_falls_from_target_to_budget() -> None:
    rewards = Length(budget=20, target=10)([""] * 6, completion_ids=ids(0, 10, 12, 15, 20, 30))
    assert rewards == [1.0, 1.0, 0.8, 0.5, 0.0, 0.0]


def test_length_of_correct_completions_only() -> None:
    texts = [r"\boxed{5}", r"\boxed{6}", r"\boxed{5}"]
    rewards = Length(budget=10, only_correct=True)(texts, completion_ids=ids(5, 1, 8), answer=["5", "5", ""])
    assert rewards == [0.5, 0.0, None]
    with pytest.raises(ValueError, match="'solution' or 'answer'"):
        Length(budget=10, only_correct=True)(texts, completion_ids=ids(5, 1, 8))


def test_length_with_a_small_weight_never_beats_accuracy() -> None:
    texts = [r"\boxed{5}", r"\boxed{6}", ""]
    length = Length(budget=10)(texts, completion_ids=ids(10, 1, 0))
    totals = [accuracy + 0.1 * present(one) for accuracy, one in zip([1.0, 0.0, 0.0], length, strict=True)]
    assert totals[0] > max(totals[1:])


@pytest.mark.parametrize("args", [{"budget": 0}, {"budget": 5, "target": 5}, {"budget": 5, "target": -1}])
def test_length_refuses_an_empty_range(args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 <= target < budget"):
        Length(**args)


def test_cosine_length_equals_trl() -> None:
    texts = [r"\boxed{5}"] * 5 + [r"\boxed{6}"] * 5 + [r"\boxed{5}"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    lengths = ids(0, 25, 50, 100, 200, 0, 25, 50, 100, 200, 7)
    solution = ["5"] * 10 + [""]
    ours = get_cosine_scaled_reward(100)(completions, lengths, solution)
    theirs = trl_rewards.get_cosine_scaled_reward(100)(completions, solution, lengths)
    assert ours == pytest.approx(theirs)
    assert ours[:5] == pytest.approx([1.0, 0.9267767, 0.75, 0.5, 0.5])
    assert ours[5:10] == pytest.approx([-1.0, -0.9267767, -0.75, -0.5, -0.5])
    assert ours[10] is None
    registered = CosineLength(max_len=100)(completions, completion_ids=lengths, answer=solution)
    assert registered == ours
    with pytest.raises(ValueError, match="max_len"):
        CosineLength(max_len=0)


def test_soft_overlong_equals_trl() -> None:
    lengths = ids(0, 80, 81, 90, 100, 101)
    assert SoftOverlong(100, 20)(lengths) == pytest.approx([0.0, 0.0, -0.05, -0.5, -1.0, -1.0])
    for cache in (0, 20, 100):
        ours = get_soft_overlong_punishment(100, cache)(completion_ids=lengths)
        assert ours == pytest.approx(trl_rewards.get_soft_overlong_punishment(100, cache)(completion_ids=lengths))
    with pytest.raises(ValueError, match="soft_punish_cache"):
        SoftOverlong(100, 101)


def test_repetition_equals_trl() -> None:
    completion_ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1], [1], []]
    assert Repetition(ngram_size=2)(completion_ids) == pytest.approx([0.0, -0.75, -0.5, 0.0, 0.0])
    for size in (1, 2, 3):
        ours = get_repetition_penalty_reward(size, -0.5)(completion_ids=completion_ids)
        theirs = trl_rewards.get_repetition_penalty_reward(size, -0.5)(completion_ids=completion_ids)
        assert ours == pytest.approx(theirs)
    with pytest.raises(ValueError, match="must not be positive"):
        Repetition(max_penalty=0.5)
    with pytest.raises(ValueError, match="at least 1"):
        Repetition(ngram_size=0)


def test_constructed_rewards_keep_the_names_of_trl_when_pickled() -> None:
    ours = [get_cosine_scaled_reward(10), get_soft_overlong_punishment(10, 5), get_repetition_penalty_reward()]
    theirs = [
        trl_rewards.get_cosine_scaled_reward(10),
        trl_rewards.get_soft_overlong_punishment(10, 5),
        trl_rewards.get_repetition_penalty_reward(),
    ]
    assert [pickle.loads(pickle.dumps(one)).__name__ for one in ours] == [one.__name__ for one in theirs]
