from typing import Any

import pytest
from rlqwen_rewards import think_format_reward
from rlqwen_rewards.answers import texts_of
from rlqwen_rewards.code_tests import code_of
from rlqwen_rewards.exact_match import ExactMatch
from rlqwen_rewards.format import Format, boxed_format
from rlqwen_rewards.tag_count import TagCount
from trl import rewards as trl_rewards

THOUGHT = "<think>\n50+7\n</think>\n\n\\boxed{57}"
BARE = r"\boxed{57}"
TEXTS = [
    THOUGHT,
    BARE,
    "<think>\nThis is my reasoning.\n</think>\nThis is my answer.",
    "<think>\nThis is my reasoning.\nThis is my answer.",
    "so <think>a</think> b",
    "<think><think>a</think> b",
    "<think>a</think> b <think>c</think>",
    "<think></think>",
    "",
]


def test_think_format_equals_trl() -> None:
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    theirs = trl_rewards.think_format_reward(completions)
    assert think_format_reward(completions) == theirs == [1, 0, 1, 0, 0, 0, 0, 1, 0]
    assert Format()(TEXTS) == theirs


@pytest.mark.parametrize(
    ("require", "rewards"),
    [("boxed", [1.0, 1.0]), ("think", [1.0, 0.0]), (["think", "boxed"], [1.0, 0.0])],
)
def test_format_scores_the_required_parts(require: str | list[str], rewards: list[float]) -> None:
    assert Format(require=require)([THOUGHT, BARE]) == rewards


@pytest.mark.parametrize(
    "text",
    ["57", r"\boxed{}", r"\boxed{57", r"\boxed{5} \boxed{7}", r"<think>\boxed{57}</think> 57", r"<think>\boxed{57}"],
)
def test_boxed_format_needs_one_non_empty_box_after_the_reasoning(text: str) -> None:
    assert boxed_format([text, BARE]) == [0.0, 1.0]


def test_answer_tags_must_hold_all_text_after_the_reasoning() -> None:
    texts = [
        "<think>a</think>\n<answer>5</answer>\n",
        "<think>a</think> well, <answer>5</answer>",
        "<think>a</think><answer>5</answer><answer>6</answer>",
        "<answer>5</answer>",
    ]
    assert Format(require=["think", "answer"])(texts) == [1.0, 0.0, 0.0, 0.0]
    assert Format(require="answer")(texts) == [1.0, 0.0, 0.0, 1.0]


def test_think_in_prompt_counts_the_opening_tag() -> None:
    assert Format(think_in_prompt=True)(["a</think>b", "<think>a</think>b", "a"]) == [1.0, 0.0, 0.0]


OPEN_PROMPTS = ["<|im_start|>assistant\n<think>\n", [{"role": "assistant", "content": "<think>\n"}]]
OPENED = ["2+2 is 4.\n</think>\n\n\\boxed{4}", "<think>2+2</think> \\boxed{4}", r"2+2 is \boxed{4}"]


@pytest.mark.parametrize("prompt", OPEN_PROMPTS)
def test_an_opening_tag_at_the_end_of_the_prompt_counts(prompt: str | list[dict[str, str]]) -> None:
    prompts = [prompt] * 3
    assert Format()(OPENED, prompts=prompts) == [1.0, 0.0, 0.0]
    assert think_format_reward(OPENED, prompts=prompts) == [1.0, 0.0, 0.0]
    assert boxed_format(OPENED, prompts=prompts) == [1.0, 1.0, 0.0]
    assert TagCount(tags=["<think>", "</think>"])(OPENED, prompts=prompts) == [1.0, 0.5, 0.5]
    assert ExactMatch()(OPENED, prompts=prompts, solution=["4"] * 3) == [1.0, 1.0, 0.0]
    assert [code_of(text) for text in texts_of(OPENED, prompts)][2] == ""


def test_an_opening_tag_elsewhere_in_the_prompt_does_not_count() -> None:
    text = ["what is <think>? 2+2", "2+2"]
    assert Format()(["a</think>b"] * 2, prompts=text) == [0.0, 0.0]
    assert Format()(["<think>a</think>b"] * 2, prompts=text) == [1.0, 1.0]


def test_prompt_opens_reasoning_decides_for_messages() -> None:
    prompts = [[{"role": "user", "content": "2+2?"}]] * 3
    completions = [[{"role": "assistant", "content": text}] for text in OPENED]
    assert Format()(completions, prompts=prompts) == [1.0, 1.0, 0.0]  # a closing tag implies an opening one
    assert Format()(completions, prompts=prompts, prompt_opens_reasoning=[True] * 3) == [1.0, 0.0, 0.0]
    assert Format()(completions, prompts=prompts, prompt_opens_reasoning=[False] * 3) == [0.0, 1.0, 0.0]
    opened: dict[str, Any] = {"prompts": prompts, "prompt_opens_reasoning": [True] * 3}
    assert boxed_format(completions, **opened) == [1.0, 1.0, 0.0]
    assert TagCount(tags=["<think>", "</think>"])(completions, **opened) == [1.0, 0.5, 0.5]


def test_pattern_must_match_the_whole_completion() -> None:
    assert Format(pattern=r"Answer: \d+.*")(["Answer: 5\nsure", "The Answer: 5", "Answer: x"]) == [1.0, 0.0, 0.0]


def test_format_refuses_unknown_parts_and_two_rules() -> None:
    with pytest.raises(ValueError, match="unknown part 'box'; known parts: think, answer, boxed"):
        Format(require=["think", "box"])
    with pytest.raises(ValueError, match="not both"):
        Format(require="think", pattern="x")


def test_tag_count_counts_tags_that_occur_once() -> None:
    texts = ["<think>a</think><answer>b</answer>", "<think>a<think></think>", ""]
    assert TagCount()(texts) == [1.0, 0.25, 0.0]
    assert TagCount(tags=["<a>", "<b>"])(["<a>"]) == [0.5]
    with pytest.raises(ValueError, match="list of at least one tag"):
        TagCount(tags="<a>")
