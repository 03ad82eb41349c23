"""Test that equal and nearly equal texts are found, and no others."""

import random

import pytest

from rlqwen.data.duplicates import find_exact_duplicates, find_near_duplicates, find_near_matches

WORDS = [f"word{i}" for i in range(500)]


def sentence(seed: int, length: int = 60) -> list[str]:
    return random.Random(seed).sample(WORDS, length)


def similarity(a: str, b: str) -> float:
    """Compute the Jaccard similarity of runs of three words directly."""
    first, second = ({tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (a.split(), b.split()))
    return len(first & second) / len(first | second)


def test_exact_duplicate_groups_are_in_order() -> None:
    assert find_exact_duplicates(["a", "b", "a", "B", "b", "a"]) == [[0, 2, 5], [1, 4]]
    assert find_exact_duplicates([]) == []


def test_the_threshold_is_the_jaccard_similarity_of_three_word_runs() -> None:
    words = sentence(0)
    text = " ".join(words)
    changed = [" ".join(["other", *words[1:]]), " ".join([*words[:30], "other", *words[31:]])]
    # 58 runs; changing the first word changes one run, changing a middle word changes three.
    assert [similarity(text, one) for one in changed] == [57 / 59, 55 / 61]
    for other, value in zip(changed, (57 / 59, 55 / 61), strict=True):
        assert find_near_duplicates([text, other], value - 0.001) == [[0, 1]]
        assert find_near_duplicates([text, other], value + 0.001) == []


def test_case_and_punctuation_are_ignored_but_numbers_are_not() -> None:
    assert find_near_duplicates(["What is 12 + 34?", "what is: 12 34", "What is 12 + 35?"], 1.0) == [[0, 1]]
    assert find_near_duplicates(["Yes.", "yes", "no", "?", "!", "", "?"]) == [[0, 1], [3, 6]]


def test_chinese_characters_count_as_words() -> None:
    text = "请写一篇关于春天的短文,描述花园里的景色和天气的变化。"
    assert find_near_duplicates([text, text.replace("短", "长"), "完全不同的另一个问题需要回答"], 0.7) == [[0, 1]]


def test_each_member_is_near_to_the_first_of_its_group() -> None:
    words = sentence(1)
    a, c = " ".join(words), " ".join(words[8:] + [f"new{i}" for i in range(8)])
    b = " ".join(words[4:] + [f"new{i}" for i in range(4)])
    assert min(similarity(a, b), similarity(b, c)) > 0.8 > similarity(a, c)
    assert find_near_duplicates([a, b, c], 0.8) == [[0, 1]]
    assert find_near_duplicates([b, a, c], 0.8) == [[0, 1, 2]]


def test_all_of_many_planted_duplicates_are_found_and_no_others() -> None:
    texts = [" ".join(sentence(seed)) for seed in range(300)]
    copies = [" ".join(["changed" if i == 20 else word for i, word in enumerate(text.split())]) for text in texts[:100]]
    groups = find_near_duplicates(texts + copies, 0.8)
    assert groups == [[i, 300 + i] for i in range(100)]


def test_near_matches_return_the_index_of_the_other_text() -> None:
    texts = [" ".join(sentence(seed)) for seed in range(4)]
    assert find_near_matches([texts[3], texts[0] + " more", "x"], [*texts[:2], texts[3]]) == [(0, 2), (1, 0)]
    assert find_near_matches(["x"], []) == []


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_an_invalid_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be above 0"):
        find_near_duplicates(["a"], threshold)
