"""Test that accuracy does not reward the question itself, hedging, answers inside reasoning, and hostile formulas."""

import threading
import time
from typing import Any

import pytest
from rlqwen_rewards import accuracy
from rlqwen_rewards.accuracy import Accuracy, grade
from rlqwen_rewards.cosine_length import CosineLength
from rlqwen_rewards.length import Length

from tests.patience import PATIENCE_S

# prompt, solution, and a boxed answer that only repeats the question
QUESTIONS = [
    ("What is 19 + 67?", "86", "19 + 67"),
    ("What is 19 + 67?", "86", "19+67"),
    ("Tom has 19 apples and picks 67 more. How many has he?", "86", "19 + 67"),
    ("Tom has 19 apples and picks 67 more. How many has he?", "86", r"67 + 19 \text{ apples}"),
    ("What is 48/2?", "24", r"\frac{48}{2}"),
    ("What is 48 ÷ 2?", "24", r"48 \div 2"),
    ("What is 1.5 + 2.25?", "3.75", "1.5 + 2.25"),
    ("Compute $2^{10}$.", "1024", "2^{10}"),
    ("Compute 2^10.", "1024", "2^{10}"),
    ("Simplify 2/6.", "1/3", "2/6"),
    (r"Simplify $\sqrt{12}$.", r"2\sqrt{3}", r"\sqrt{12}"),
    (r"Expand $(x+1)^2$.", "x^2+2x+1", "(x+1)^2"),
    (r"Expand $(x+1)^2$.", "x^2+2x+1", "y = (x+1)^2"),
    (r"Factor $x^{2} - 1$.", "(x-1)(x+1)", "x^2-1"),
    (r"Evaluate $\int_0^1 x\,dx$.", r"\frac{1}{2}", r"\int_0^1 x\,dx"),
    (r"计算 ３×４。", "12", r"3 \times 4"),
]


@pytest.mark.parametrize(("prompt", "solution", "answer"), QUESTIONS)
def test_the_question_is_not_rewarded_as_an_answer(prompt: str, solution: str, answer: str) -> None:
    text = rf"\boxed{{{answer}}}"
    assert Accuracy()([text], solution=[solution], prompts=[prompt]) == [0.0]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    completion = [{"role": "assistant", "content": text}]
    assert Accuracy()([completion], solution=[solution], prompts=[messages]) == [0.0]


@pytest.mark.parametrize(
    ("prompt", "solution", "answer"),
    [
        ("Which is larger, 1/3 or 1/4?", "1/3", r"\frac{1}{3}"),
        ("Which is larger, 1/3 or 1/4?", r"\frac{1}{3}", "1/3"),
        ("A coin shows heads with probability 0.5. And tails?", "1/2", "0.5"),
        (r"Which is even, $x^2$ or $x^3$?", "x^{2}", "x^2"),
        ("There are 1,000 of them. How many?", "1000", "1,000"),
        ("What is 10 * 100,000?", "1,000,000", "10^6"),
        ("What is 19 + 67?", "86", "19 + 67 = 86"),
        (r"Solve $2x = 10$.", "5", "x = 5"),
        (r"Expand $(x+1)^2$.", "x^2+2x+1", "1 + 2x + x^2"),
    ],
)
def test_a_computed_answer_that_is_in_the_prompt_is_rewarded(prompt: str, solution: str, answer: str) -> None:
    assert Accuracy()([rf"\boxed{{{answer}}}"], solution=[solution], prompts=[prompt]) == [1.0]


HEDGES = [
    "\\boxed{71}\n\\boxed{72}",
    "\\boxed{71}\n\n\\boxed{72}",
    r"\boxed{71}\boxed{72}",
    r"\boxed{71}, \boxed{72}",
    r"\boxed{71}; \boxed{72}",
    r"\boxed{71} / \boxed{72}",
    r"\boxed{71} | \boxed{72}",
    r"\boxed{71} & \boxed{72}",
    r"\boxed{71} \quad \boxed{72}",
    r"\boxed{71} = \boxed{72}",
    r"$\boxed{71}$ or $\boxed{72}$",
    r"\(\boxed{71}\) \(\boxed{72}\)",
    r"$\boxed{71}$ and possibly $\boxed{72}$",
    r"\boxed{71} or maybe \boxed{72}",
    r"\boxed{71} alternatively \boxed{72}",
    r"\boxed{71}, but it could be \boxed{72}",
    r"\boxed{71} or, if that is wrong, \boxed{72}",
    r"\boxed{71} \text{ or } \boxed{72}",
    r"\boxed{71} vs \boxed{72}",
    r"\boxed{71} 或 \boxed{72}",
    r"\boxed{71}或者\boxed{72}",
    r"\boxed{71} 还是 \boxed{72}",
    "- \\boxed{71}\n- \\boxed{72}",
    "1. $\\boxed{71}$\n2. $\\boxed{72}$",
    r"\boxed{71 \text{ or } 72}",
    r"\boxed{71或72}",
    r"\boxed{71、72}",
    r"\boxed{1 = 2 = 72}",
    r"\boxed{x = 71 = 72}",
    r"\boxed{71 \approx 72}",
    "The answer is $71$. The answer is $72$.",
    "The answer is $72$. The answer is $71$.",
    "The answer is $71$ or $72$.",
    "The answer is $1 = 2 = 72$.",
    "答案是 $71$ 或 $72$。",
    "#### 71 or 72",
    "#### 71\n#### 72",
    "\\boxed{71}\n#### 72",
    "<answer>71</answer> <answer>72</answer>",
    "<answer>71 or 72</answer>",
    "\\boxed{72}\n#### 71",
]


@pytest.mark.parametrize("text", HEDGES)
def test_several_answers_instead_of_one_are_not_rewarded(text: str) -> None:
    assert Accuracy()([text], solution=["72"]) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{71} is wrong, so \boxed{72}",
        r"\boxed{71}. Wait, no: \boxed{72}",
        r"There are \boxed{12} in the big box. After that we add sixty of them, which makes a total of \boxed{72}.",
        r"\boxed{72}, that is, \boxed{72}",
        "The answer is $\\boxed{72}$.\n#### 72",
        "\\boxed{72}\n#### 72 clips",
        "\\boxed{72}\n\n#### Check\n48 + 24 = 72",
        "<answer>72</answer>",
        "<answer>So it is $\\boxed{72}$.</answer>",
        "The answer is $71$. Wait, that is wrong. The answer is $72$.",
        "**Answer:** \\(72\\)",
        "答案是 $72$。",
    ],
)
def test_one_final_answer_is_rewarded(text: str) -> None:
    assert Accuracy()([text], solution=["72"]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        r"<think>\boxed{72}</think> done",
        r"<think>so \boxed{72}",
        r"<think>a<think>b</think>\boxed{72}</think>",
        r"\boxed{72}</think>",
        r"<think>a</think> \boxed{72} <think> wait",
        r"<think>a</think> \boxed{72} <think>wait</think>",
        r"<think>a</think> \boxed{71} <think>wait</think> \boxed{72}",
        r"\boxed{71} <think>wait</think> \boxed{72}",
    ],
)
def test_an_answer_inside_or_before_reasoning_is_not_rewarded(text: str) -> None:
    assert Accuracy()([text], solution=["72"]) == [0.0]


def test_an_answer_after_several_blocks_of_reasoning_is_rewarded() -> None:
    assert Accuracy()([r"<think>a</think> <think>b</think> \boxed{72}"], solution=["72"]) == [1.0]


OPEN_PROMPTS = ["<|im_start|>assistant\n<think>\n", [{"role": "assistant", "content": "<think>\n"}]]


@pytest.mark.parametrize("prompt", OPEN_PROMPTS)
def test_reasoning_opened_by_the_prompt_must_be_closed(prompt: str | list[dict[str, str]]) -> None:
    texts = [r"maybe \boxed{4}, but wait", r"maybe \boxed{4}</think> no", r"2+2</think> \boxed{4}"]
    many: dict[str, Any] = {"solution": ["4"] * 3, "prompts": [prompt] * 3}
    assert Accuracy()(texts, **many) == [0.0, 0.0, 1.0]
    ids = [[1]] * 3
    assert Length(budget=2, only_correct=True)(texts, completion_ids=ids, **many) == [0.0, 0.0, 0.5]
    right = [
        reward is not None and reward > 0 for reward in CosineLength(max_len=10)(texts, completion_ids=ids, **many)
    ]
    assert right == [False, False, True]


def test_reasoning_opened_by_the_template_must_be_closed() -> None:
    texts, prompts = [r"maybe \boxed{4}"] * 2, [[{"role": "user", "content": "2+2?"}]] * 2
    assert Accuracy()(texts, solution=["4"] * 2, prompts=prompts) == [1.0, 1.0]
    rewards = Accuracy()(texts, solution=["4"] * 2, prompts=prompts, prompt_opens_reasoning=[True, False])
    assert rewards == [0.0, 1.0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the alarm may interrupt a destructor
@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}", "10^{10^{10}}", "x^{99999}", "(x+1)^{5000}", "100000!", "9!!!!", r"\binom{100000}{50000}",
        r"\sum_{i=1}^{1000000} i", r"\prod_{i=1}^{100000} i", "(1+x)" * 60, "x+" * 300 + "1", "(" * 400 + "x" + ")" * 400,
    ],
)  # fmt: skip
def test_hostile_formulas_are_wrong_in_time_on_the_main_thread(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "_TIMEOUT", 1)
    start = time.process_time()
    assert [grade(rf"\boxed{{{answer}}}", gold) for gold in ("72", "x^2+1")] == [0.0] * 2
    assert time.process_time() - start < 30  # one second per formula


def test_a_completion_whose_comparison_times_out_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "_TIMEOUT", 1)
    monkeypatch.setattr(accuracy, "same", lambda *_: time.sleep(20))
    assert grade(r"\boxed{x+x}", "2x") == 0.0
    assert grade(r"\boxed{2x}", "2x") == 1.0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_alarm_that_a_destructor_swallows_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __del__(self) -> None:
            time.sleep(20)

    def check(*_: object) -> None:
        Slow()
        time.sleep(20)

    monkeypatch.setattr(accuracy, "_TIMEOUT", 1)
    monkeypatch.setattr(accuracy, "same", check)
    start = time.monotonic()
    assert grade(r"\boxed{x+x}", "2x") == 0.0
    assert time.monotonic() - start < 15


def test_a_gold_answer_whose_check_times_out_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "_TIMEOUT", 1)
    monkeypatch.setattr(accuracy, "is_meaningful", lambda *_: time.sleep(20))
    assert grade(r"\boxed{x+x}", "3x + 987654") is None


def test_power_towers_are_wrong_off_the_main_thread() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(grade(r"\boxed{9^{9^{9^{9}}}}", "x^2+2")), daemon=True)
    thread.start()
    thread.join(timeout=PATIENCE_S)
    assert found == [0.0]
