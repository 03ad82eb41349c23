"""Test metrics that compare texts by hand, in English and Chinese."""

from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import SourceConfig
from rlqwen.config.evaluation import TextMetric
from rlqwen.data import load_rows
from rlqwen.data.references import own_answer, references_of
from rlqwen.errors import DataError
from rlqwen.evaluation.metrics.answer_extraction import after_reasoning, normalize_answer, same_answer
from rlqwen.evaluation.metrics.classification import find_label, label_metrics, label_set
from rlqwen.evaluation.metrics.text_metrics import RougeTokenizer, TextMeasure, bleu_tokenizer, text_metrics
from rlqwen.types import Completion, Group, Prompt

SAMPLES = Path(__file__).parents[1] / "samples"


def score_text(metric: TextMetric, text: str, *references: str) -> Any:
    return text_metrics([metric], [text], [list(references)])


# The texts share five of six tokens, three of five bigrams, two of four trigrams, and one of three 4-grams.
PAIRS = [
    ("the cat sat on the mat", "the cat sat on a mat", "13a"),
    ("今天天气很好", "今天天气不好", "zh"),
]


@pytest.mark.parametrize(("text", "reference", "tokenizer"), PAIRS)
def test_bleu_counts_words_or_chinese_characters_and_says_which(text: str, reference: str, tokenizer: str) -> None:
    found = score_text("bleu", text, reference)
    assert found.values["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert f"tok:{tokenizer}|" in found.signatures["bleu"]


@pytest.mark.parametrize(
    ("references", "tokenizer"),
    [
        ([["hello 你好"], ["good morning"]], "13a"),
        ([["你好，Qwen 是模型。今天天气很好"]], "zh"),
        ([["これはペンです。"]], "char"),
        ([["42"], ["7"]], "13a"),
    ],
)
def test_the_most_frequent_script_selects_the_tokenizer(references: list[list[str]], tokenizer: str) -> None:
    assert bleu_tokenizer(references) == tokenizer


def test_chrf_averages_over_the_possible_orders() -> None:
    found = score_text("chrf", "abc", "abd")
    # The texts share 2/3 of characters, 1/2 of bigrams and no trigram; precision and recall are equal.
    assert found.values["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert "nc:6|nw:0" in found.signatures["chrf"]
    assert score_text("chrf", "你好世界", "你好世界").values["chrf"] == 100


@pytest.mark.parametrize(("text", "reference", "tokenizer"), PAIRS)
def test_rouge_counts_words_or_chinese_characters(text: str, reference: str, tokenizer: str) -> None:
    values = score_text("rouge", text, reference).values
    assert values == pytest.approx({"rouge_1": 5 / 6, "rouge_2": 3 / 5, "rouge_l": 5 / 6})


def test_rouge_l_respects_order_and_uses_the_best_reference() -> None:
    assert score_text("rouge", "a b", "b a").values == pytest.approx({"rouge_1": 1, "rouge_2": 0, "rouge_l": 0.5})
    assert score_text("rouge", "a b", "c d", "a b").values["rouge_l"] == 1
    both = text_metrics(["rouge"], ["a", "b"], [["a"], ["c"]])
    assert both.values["rouge_1"] == 0.5


def test_rouge_tokens_of_mixed_text() -> None:
    tokens = RougeTokenizer().tokenize("Qwen3 是一个LLM，Größe 1.5_b! テスト")
    assert tokens == ["qwen3", "是", "一", "个", "llm", "größe", "1", "5", "b", "テ", "ス", "ト"]


def test_bleu_accepts_different_numbers_of_references() -> None:
    texts, references = ["the cat sat on the mat", "a b c d"], [["x y z u"], ["e f g h", "a b c d"]]
    found = text_metrics(["bleu"], texts, references)
    assert found.values["bleu"] > text_metrics(["bleu"], texts, [["x y z u"], ["e f g h"]]).values["bleu"]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("Paris.", "paris"),
        ("**北京**。", "北京"),
        ("４２", "42"),
        (r"so \boxed{1,234.50}", "5 + 5 ... #### 1234.5"),
        ("<think>7 or 8</think>\n\n8", "8"),
        ("1234567890123456789", "1,234,567,890,123,456,789"),
        ("a  b\nc", "A b c"),
    ],
)
def test_answers_that_differ_only_in_form_are_equal(text: str, reference: str) -> None:
    assert same_answer(text, reference)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("-5", "5"),
        ("3.5", "35"),
        ("1,2", "12"),
        ("the answer is Paris", "Paris"),
        ("1234567890123456788", "1234567890123456789"),
        ("<think>it is 8", "8"),
        ("", "8"),
    ],
)
def test_different_answers_are_not_equal(text: str, reference: str) -> None:
    assert not same_answer(text, reference)


def test_exact_match_counts_a_match_with_any_reference() -> None:
    assert text_metrics(["exact_match"], ["a", "b", "x"], [["A"], ["c", "b."], ["y"]]).values == {
        "exact_match": pytest.approx(2 / 3)
    }


def test_reasoning_is_not_compared() -> None:
    assert after_reasoning("<think>a b</think>\n\nc d") == "c d"
    assert after_reasoning("a b") == "a b"
    assert score_text("rouge", "<think>no</think>a b", "a b").values["rouge_2"] == 1
    assert score_text("bleu", "<think>never ends a b c d", "a b c d").values["bleu"] == 0


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("positive", "positive"),
        ("  Positive!", "positive"),
        ("The review is positive.", "positive"),
        ("very positive, I think", "very positive"),
        ("positive or negative", None),
        ("positively", None),
        ("I don't know", None),
        (r"negative at first, but \boxed{positive}", "positive"),
        ("<think>negative?</think> positive", "positive"),
        ("<think>positive", None),
        ("情感是正面的", "正面"),
        ("正面和负面", None),
        ("标签：负面。", "负面"),
    ],
)
def test_the_label_is_the_answer_or_the_only_one_named(text: str, label: str | None) -> None:
    assert find_label(text, ["positive", "negative", "very positive", "正面", "负面"]) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("b", "b"),
        ("(B)", "b"),
        ("It is a good one: B.", "b"),
        ("it is a good one", None),
        ("A or B", None),
        ("5 stars", "5"),
    ],
)
def test_a_single_letter_is_a_label_in_a_text_only_if_uppercase(text: str, label: str | None) -> None:
    assert find_label(text, ["a", "b", "5"]) == label


def test_label_metrics_by_hand() -> None:
    found = label_metrics(["a", "a", "b", None], ["a", "b", "b", "b"])
    assert found.accuracy == 1 / 2
    assert found.unparsable == 1 / 4
    # a: one correct, two found, one expected: 2/3. b: one correct, one found, three expected: 1/2.
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.micro_f1 == pytest.approx(2 * 2 / (3 + 4))


def test_micro_f1_equals_the_accuracy_if_every_text_has_a_label() -> None:
    found = label_metrics(["a", "c", "b"], ["a", "b", "b"])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.micro_f1 == pytest.approx(2 / 3)
    # c was found once and never expected, so its F1 of 0 counts in the mean.
    assert found.macro_f1 == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_invalid_labels_are_refused_with_their_row() -> None:
    assert label_set([["Yes"], ["no"], ["yes."]], None) == ["yes", "no"]
    with pytest.raises(DataError, match="row 1: 'maybe' is none of the labels yes, no"):
        label_set([["yes"], ["maybe"]], ["Yes", "No"])
    with pytest.raises(DataError, match="101 different values, such as 'word 0'"):
        label_set([[f"word {i}"] for i in range(101)], None)
    with pytest.raises(DataError, match="row 0: one label is right"):
        label_set([["a", "b"]], None)


MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "about 4"}]


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"prompt": "q", "completion": "c"}, None, ["c"]),
        ({"prompt": "q", "completion": "c", "solution": "s"}, None, ["s"]),
        ({"prompt": "q", "completion": "c", "solution": "s"}, "completion", ["c"]),
        ({"messages": MESSAGES, "solution": "4"}, "completion", ["about 4"]),
        ({"messages": MESSAGES}, None, ["about 4"]),
        ({"prompt": "q", "answer": 4}, None, ["4"]),
        ({"prompt": "q", "names": ["a", "b"]}, "names", ["a", "b"]),
        ({"prompt": "q", "label": 0}, "label", ["0"]),
    ],
)
def test_references_come_from_the_columns_of_rewards_or_a_given_column(
    row: dict[str, Any], column: str | None, expected: list[str]
) -> None:
    assert references_of(row, column, "row 0") == expected


@pytest.mark.parametrize("row", [{"prompt": "q"}, {"prompt": "q", "solution": " "}, {"prompt": "q", "solution": []}])
def test_a_row_without_a_correct_answer_is_refused_with_its_number(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"row 7: there is no right answer .* the row has prompt"):
        references_of(row, None, "row 7")
    assert own_answer({"prompt": "q"}, "row 7") is None


def test_completions_are_compared_with_the_references_of_their_own_row() -> None:
    rows = [{"prompt": f"{i}", "solution": f"{i}"} for i in range(3)]
    measure = TextMeasure(["exact_match", "label", "exact_match"], rows)
    groups = [
        Group(Prompt(row, [1], str(row)), [Completion([1], [], "stop", text) for text in texts], 0)
        for row, texts in ((2, ["2", "1"]), (0, ["0", "so 0"]))
    ]
    values = measure.compute(groups).values
    assert (values["exact_match"], values["label/accuracy"]) == (0.5, 0.75)
    assert measure.keys == list(values)


def test_normalizing_never_empties_an_answer() -> None:
    assert normalize_answer("...") == "..."
    assert normalize_answer("007.0") == "7"
    assert normalize_answer("100") == "100"


@pytest.mark.parametrize(
    ("name", "columns", "tokenizer"),
    [("instructions_zh.json", {}, "zh"), ("word_problems.jsonl", {"prompt": "question", "solution": "answer"}, "13a")],
)
def test_whole_answers_match_themselves_and_not_each_other(name: str, columns: dict[str, Any], tokenizer: str) -> None:
    rows = load_rows(SourceConfig(path=str(SAMPLES / name), columns=columns, limit=20), seed=0)
    references = [references_of(row, None, "row") for row in rows]
    texts = [several[0] for several in references]
    same = text_metrics(["bleu", "chrf", "rouge", "exact_match"], texts, references)
    assert f"tok:{tokenizer}|" in same.signatures["bleu"]
    assert same.values["exact_match"] == same.values["rouge_l"] == 1
    assert (same.values["bleu"], same.values["chrf"]) == pytest.approx((100, 100))
    shifted = text_metrics(["bleu", "rouge"], texts[1:] + texts[:1], references)
    assert shifted.values["bleu"] < 20
    assert shifted.values["rouge_l"] < 0.4
