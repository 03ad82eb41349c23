import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rlqwen_rewards import accuracy, accuracy_reward, reasoning_accuracy_reward
from rlqwen_rewards.accuracy import Accuracy, grade
from rlqwen_rewards.exact_match import ExactMatch
from trl import rewards as trl_rewards

WORD_PROBLEMS = Path(__file__).parents[1] / "samples" / "word_problems.jsonl"

SAME_AS_TRL = [
    (r"\boxed{72}", "72", 1.0),
    (r"\boxed{73}", "72", 0.0),
    (r"\boxed{72}", "48 + 24 = <<48+24=72>>72\n#### 72", 1.0),
    (r"\boxed{1,234}", "1234", 1.0),
    (r"\boxed{1234}", "1,234", 1.0),
    (r"\boxed{1{,}234}", "1234", 1.0),
    (r"\boxed{\frac{2}{6}}", r"\frac{1}{3}", 1.0),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0),
    (r"\boxed{0.333333}", "1/3", 1.0),
    (r"\boxed{72.0}", "72", 1.0),
    (r"\boxed{72\text{ clips}}", "72", 1.0),
    (r"\boxed{10\text{ cm}}", "10 cm", 1.0),
    (r"\boxed{\$10}", "10", 1.0),
    (r"\boxed{90^\circ}", "90", 1.0),
    (r"\boxed{50\%}", "0.5", 1.0),
    (r"\boxed{50\%}", "50%", 1.0),
    (r"\boxed{x=5}", "5", 1.0),
    (r"\boxed{\{1,2\}}", r"$\{2,1\}$", 1.0),
    (r"\boxed{10^6}", "1,000,000", 1.0),
    (r"\boxed{+72}", "72", 1.0),
    (r"\boxed{-72}", "72", 0.0),
    (r"\boxed{072}", "72", 1.0),
    (r"\boxed{5 million}", "5", 0.0),
    (r"\boxed{1}, \boxed{2}", "2", 0.0),
    ("The answer is $72$.", "72", 1.0),
    ("The answer is 72.", "72", 0.0),
    ("72", "72", 0.0),
    (r"\boxed{72", "72", 0.0),
    (r"\boxed{}", "72", 0.0),
    ("", "72", 0.0),
    (r"\boxed{3}", "", None),
    (r"\boxed{3}", "I do not know", None),
]

BETTER_THAN_TRL = [  # text, solution, ours, TRL's
    ("#### 72", "72", 1.0, 0.0),
    ("#### $1,000", "1000", 1.0, 0.0),
    (r"\boxed{1} is wrong, so \boxed{2}", "2", 1.0, 0.0),
    (r"\boxed{1} and \boxed{2}", "{1,2}", 1.0, None),
    (r"\boxed{72 clips}", "72", 1.0, 0.0),
    (r"\boxed{72.}", "72", 1.0, 0.0),
    (r"\boxed{50}\%", "0.5", 1.0, 0.0),
    (r"\boxed{\dfrac13}", "1/3", 1.0, 0.0),
    (r"\boxed{2}", r"2\sqrt{3}", 0.0, 1.0),
    (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}", 1.0, 0.0),
    (r"\boxed{1+x^2}", "x^2+1", 1.0, None),
    (r"\boxed{[1,2)}", "[1,2)", 1.0, None),
    (r"\boxed{\text{Paris}}", "Paris", 1.0, None),
    (r"\boxed{pairs}", "Paris", 0.0, None),
    (r"\boxed{(B)}", "B", 1.0, None),
]


def conversation(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(("text", "solution", "reward"), SAME_AS_TRL)
def test_accuracy_equals_trl_if_trl_is_correct(text: str, solution: str, reward: float | None) -> None:
    assert trl_rewards.accuracy_reward([conversation(text)], [solution]) == [reward]
    assert accuracy_reward([conversation(text)], [solution]) == [reward]
    assert Accuracy()([text], answer=[solution]) == [reward]


@pytest.mark.parametrize(("text", "solution", "ours", "theirs"), BETTER_THAN_TRL)
def test_accuracy_corrects_errors_of_trl(text: str, solution: str, ours: float, theirs: float | None) -> None:
    assert accuracy_reward([conversation(text)], [solution]) == [ours]
    assert trl_rewards.accuracy_reward([conversation(text)], [solution]) == [theirs]


def test_accuracy_is_the_same_off_the_main_thread() -> None:
    cases = [(text, solution) for text, solution, _ in SAME_AS_TRL]
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.extend(grade(text, solution) for text, solution in cases))
    thread.start()
    thread.join()
    assert result == [reward for _, _, reward in SAME_AS_TRL]


@pytest.mark.parametrize(
    "text",
    [r"\( " * 12_000, r"\boxed{" + "(" * 2000 + ")" * 2000 + "}", "the answer is $" * 3000, r"\boxed{" * 10_000],
    ids=["open formulas", "nested", "anchors", "open boxes"],
)
def test_degenerate_completions_are_wrong_in_little_time(text: str) -> None:
    start = time.process_time()
    assert grade(text, "72.5") == 0.0
    assert grade(text, "72.5", plain=True) == 0.0
    assert time.process_time() - start < 10


def test_integers_get_the_same_grade_with_and_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    golds = ("0", "-0", "7", "-7", "1,000", "1000", "007", "#### 7")
    answers = ("0", "7", "-7", "1000", "1,000", "07", r"\$7", "1{,}000", "7 ")
    cases = [(rf"\boxed{{{answer}}}", gold) for gold in golds for answer in answers]
    quick = [grade(text, gold) for text, gold in cases]
    monkeypatch.setattr(accuracy, "_compare_integers", lambda *_: None)
    assert [grade(text, gold) for text, gold in cases] == quick
    assert 1.0 in quick


def test_plain_accepts_the_last_number_or_formula() -> None:
    assert grade("So she needs 5 more.", "5") == 0.0
    assert grade("So she needs 5 more.", "5", plain=True) == 1.0
    assert grade("First $3$, then $5$", "5", plain=True) == 1.0


@pytest.mark.parametrize(
    ("text", "solution", "expected"),
    [
        ("The answer is 72. That took 3 steps.", "72", 1.0),
        ("The answer is the number of clips, which is 72.", "72", 1.0),
        ("答案是 72 元。", "72", 1.0),
        ("The answer is (B).", "B", 1.0),
        ("**Answer: B**", "B", 1.0),
        ("B", "B", 1.0),
        ("Answer: Paris", "Paris", 1.0),
        ("The answer is 71. The answer is 72.", "72", 0.0),
        ("The answer is A. Or the answer is B.", "B", 0.0),
        ("The answer is 71. Wait, that is wrong. The answer is 72.", "72", 1.0),
    ],
)
def test_plain_accepts_the_text_after_the_answer_is(text: str, solution: str, expected: float) -> None:
    assert grade(text, solution, plain=True) == expected


def test_any_of_several_solutions_is_accepted() -> None:
    assert grade(r"\boxed{2}", ["1", "2"]) == 1.0
    assert grade(r"\boxed{3}", ["1", "2"]) == 0.0
    assert grade(r"\boxed{3}", [""]) is None


def test_only_the_answer_after_the_reasoning_counts() -> None:
    texts = [
        r"<think>\boxed{5}</think> \boxed{7}",
        r"<think>\boxed{7}</think> \boxed{5}",
        r"<think>\boxed{7}</think> I am not sure",
        r"<think>so \boxed{7}",
    ]
    assert Accuracy()(texts, solution=["7"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert accuracy_reward(texts, ["7"] * 4) == [1.0, 0.0, 1.0, 1.0]


def test_reasoning_accuracy_equals_trl() -> None:
    texts = [r"<think>x</think> \boxed{7}", r"\boxed{7}", r"<think>\boxed{7}</think> no", r"x</r> \boxed{7}"]
    completions = [conversation(text) for text in texts]
    for delimiters in (None, ["</r>"], ["</r>", "</think>"]):
        theirs = trl_rewards.reasoning_accuracy_reward(completions, ["7"] * 4, delimiters)
        assert reasoning_accuracy_reward(completions, ["7"] * 4, delimiters) == theirs


def test_accuracy_prefers_column_solution_and_needs_one() -> None:
    assert Accuracy()([r"\boxed{1}"], solution=["1"], answer=["2"]) == [1.0]
    with pytest.raises(ValueError, match="'solution' or 'answer'"):
        Accuracy()([r"\boxed{1}"])


def test_exact_match() -> None:
    gold = ["#### 72", "The  Eiffel Tower", "no"]
    texts = ["<think>5</think>72\n", "the eiffel tower!", "<think>no"]
    assert ExactMatch()(texts, solution=gold) == [1.0, 0.0, 0.0]
    assert ExactMatch(ignore_case=True)(texts, answer=gold) == [1.0, 0.0, 0.0]
    assert ExactMatch(ignore_case=True, ignore_punctuation=True)(texts, answer=gold) == [1.0, 1.0, 0.0]
    assert ExactMatch()([r"so \boxed{72}"], solution=[["71", 72]]) == [1.0]


def test_correct_answers_to_word_problems_get_1_and_wrong_ones_0() -> None:
    with WORD_PROBLEMS.open(encoding="utf-8") as lines:
        rationales = [json.loads(line)["answer"] for line in lines]
    finals = [rationale.split("####")[1].strip() for rationale in rationales]
    off_by_one = [str(int(final.replace(",", "")) + 1) for final in finals]
    assert set(Accuracy()(rationales, solution=rationales)) == {1.0}
    assert set(Accuracy()([rf"\boxed{{{final}}}" for final in finals], answer=rationales)) == {1.0}
    assert set(Accuracy()([rf"\boxed{{{wrong}}}" for wrong in off_by_one], answer=rationales)) == {0.0}
    some = slice(0, None, 4)
    decimal = [rf"\boxed{{{final}.0}}" for final in finals[some]]
    assert set(Accuracy()(decimal, answer=rationales[some])) == {1.0}
