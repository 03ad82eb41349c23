import time

import pytest
from rlqwen_rewards.answers import boxed_answer, final_text, hashed_answer, marked_answer, text_of

from rlqwen.types import Completion


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "one"}], "one"),
        ([{"role": "assistant", "content": "call"}, {"role": "tool", "content": "4"}, {"content": "last"}], "last"),
        ([{"role": "assistant", "content": "said"}, {"role": "assistant", "content": None}], "said"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([], ""),
    ],
)
def test_text_of_reads_every_form_of_completion(completion: Completion, text: str) -> None:
    assert text_of(completion) == text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{57}", "57"),
        (r"\boxed{\frac{1}{3}} done", r"\frac{1}{3}"),
        (r"\boxed{1} is wrong, so \boxed{2}", "2"),
        (r"\boxed{1} or \boxed{2}", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\fbox{5}", "5"),
        (r"\boxed{50}\%", r"50\%"),
        (r"\boxed{4} and then \boxed{5", "4"),
        (r"\boxed{4 and \boxed{5}", "5"),
        (r"} \boxed{5} {", "5"),
        (r"\boxed{5", None),
        ("57", None),
    ],
)
def test_boxed_answer(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("#### 1\nno\n#### 72 \nbye", "72"), ("####72", "72"), ("####", None), ("### 72", None)],
)
def test_hashed_answer_is_the_rest_of_the_line_after_the_last_hashes(text: str, answer: str | None) -> None:
    assert hashed_answer(text) == answer


def test_a_box_precedes_hashes_and_an_empty_box_is_no_answer() -> None:
    assert marked_answer("\\boxed{5}\n#### 6") == "5"
    assert marked_answer("\\boxed{}\n#### 6") == "6"
    assert marked_answer(r"\boxed{}") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>\n72\n</answer>", "72"),
        ("<answer>72 clips</answer>.", "72 clips"),
        ("<answer>71</answer> <answer>72</answer>", "71, 72"),
        ("<answer>\\boxed{5}</answer>", "5"),
        ("<answer>72", None),
        ("<answer></answer>", None),
        ("72</answer>", None),
    ],
)
def test_an_answer_may_be_in_tags(text: str, answer: str | None) -> None:
    assert marked_answer(text) == answer


def test_many_unclosed_tags_take_linear_time() -> None:
    start = time.process_time()
    assert marked_answer("<answer>" * 50_000) is None
    assert marked_answer("<answer>5</answer>" + "<answer>" * 50_000) == "5"
    assert time.process_time() - start < 10  # quadratic time would take minutes


def test_final_text_needs_closed_reasoning() -> None:
    assert final_text("<think>1</think>2</think>3") == "3"
    assert final_text("<think>never closed") is None
    assert final_text("no reasoning") == "no reasoning"


def test_many_unclosed_boxes_take_linear_time() -> None:
    start = time.process_time()
    assert boxed_answer(r"\boxed{" * 50_000) is None
    assert boxed_answer(r"\boxed{" * 50_000 + "5}") == "5"
    assert time.process_time() - start < 10  # 0.1 s measured; quadratic time would take minutes
