"""Exact and near duplicates, against the definition."""

import random

import numpy as np
import pytest

from rlqwen.data.duplicates import (
    find_exact_duplicates,
    find_near_duplicates,
    find_near_matches,
    shingle_hashes,
)

STORY = "Once upon a time there was an old miller who had three sons, and nothing to leave them but his mill."
CHINESE = "从前有一位年老的磨坊主人，他有三个儿子，除了一座磨坊、一头驴子和一只猫以外，没有别的东西可以留给他们。"


def similarity(left: str, right: str, width: int = 5) -> float:
    """The Jaccard index by its definition, on sets of strings; for text without spacing or case to level."""
    sets = [{text[i : i + width] for i in range(max(len(text) - width + 1, 1))} for text in (left, right)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_exact_duplicates_are_grouped_in_order():
    assert find_exact_duplicates(["b", "a", "b", "c", "a", "b", "A"]) == [[0, 2, 5], [1, 4]]
    assert find_exact_duplicates([]) == []


def test_hashes_count_as_many_shingles_as_there_are():
    for text, width, count in (("abcdef", 5, 2), ("aaaaaaa", 5, 1), ("abc", 5, 1), ("", 5, 1), ("一二三", 2, 5)):
        assert len(shingle_hashes(text, width)) == count, text
    assert np.array_equal(shingle_hashes("A  bc\nd", 3), shingle_hashes("a bc d", 3))
    assert len(np.intersect1d(shingle_hashes("abcdefg", 5), shingle_hashes("bcdefgh", 5))) == 2


def test_one_word_of_a_sentence_is_near_and_another_sentence_is_not():
    texts = [STORY, STORY.replace("old", "aged"), STORY[::-1], STORY.upper(), "A cat."]
    assert find_near_duplicates(texts) == [[0, 1, 3]]
    assert find_near_duplicates(texts, 1.0) == [[0, 3]]


def test_chinese_is_compared_by_its_characters():
    other = "后来大儿子得到了磨坊，二儿子得到了驴子，小儿子只得到那只猫，他很难过，不知道今后该怎么过日子才好。"
    assert find_near_duplicates([CHINESE, other, CHINESE.replace("年老", "年迈"), other]) == [[0, 2], [1, 3]]


def test_a_chain_of_small_steps_does_not_join_its_ends():
    words = STORY.split()
    chain = [" ".join(["other", "words"] * (step // 2) + words[step:]) for step in range(0, len(words), 2)]
    groups = find_near_duplicates(chain, 0.7)
    assert groups
    for leader, *members in groups:
        for member in members:
            assert similarity(chain[leader].lower(), chain[member].lower()) >= 0.7


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95])
def test_what_is_found_is_what_the_definition_says(threshold):
    """Pairs of all similarities: none below the threshold is found, and above it by 0.05 hardly any is missed."""
    rng = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    bases = ["".join(rng.choices(alphabet, k=200)) for _ in range(300)]
    changed = []
    for number, base in enumerate(bases):
        letters = list(base)
        for _ in range(number % 30):
            letters[rng.randrange(len(letters))] = rng.choice(alphabet)
        changed.append("".join(letters))
    true = {i: similarity(base, other) for i, (base, other) in enumerate(zip(bases, changed, strict=True))}
    found = find_near_matches(changed, bases, threshold)
    assert all(found[i] == i for i in found)
    assert all(true[i] >= threshold for i in found)
    sure = [i for i in true if true[i] >= min(threshold + 0.05, 1.0)]
    assert len(sure) > 10
    assert sum(i in found for i in sure) >= 0.98 * len(sure)


def test_kinds_that_are_set_apart_are_never_grouped():
    texts = [STORY] * 4
    assert find_near_duplicates(texts, apart=["a", "b", "a", "b"]) == [[0, 2], [1, 3]]


def test_a_match_is_the_first_reference():
    assert find_near_matches(["x", STORY + "!"], ["A cat.", STORY, STORY + "!"]) == {1: 1}
    assert find_near_matches([STORY], []) == {}


def test_few_permutations_and_odd_texts_work():
    texts = ["", "\ud800", "😀", " ", STORY * 400, STORY * 400 + "."]
    for num_perm in (16, 64):
        assert find_near_duplicates(texts, num_perm=num_perm) == [[0, 3], [4, 5]]


def test_hashes_are_the_same_on_every_machine():
    """What is cached here must be what another machine would find; so no hash of Python's own, which has a seed."""
    assert shingle_hashes("abcdefg", 5).tolist() == [367754656, 2156673543, 2788409704]
