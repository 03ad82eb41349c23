import time

import pytest
from rlqwen_rewards.language import Language

TEXTS = {
    "en": "First we add the numbers, then we carry the one, and finally write the result.",
    "de": "Zuerst addieren wir die beiden Zahlen, dann schreiben wir das Ergebnis in die Box.",
    "fr": "D'abord nous additionnons les nombres, puis nous écrivons le résultat final ici.",
    "zh": "我们首先把这两个数字相加，然后进位，最后写出结果。所以答案就是五十七。",
    "ja": "まず二つの数字を足して、それから一を繰り上げて、最後に結果を書きます。したがって答えは五十七です。",
    "ru": "Сначала мы складываем числа, затем переносим единицу и записываем окончательный результат.",
    "uk": "Спочатку ми додаємо числа, потім переносимо одиницю і записуємо остаточний результат.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_each_language_is_distinguished_from_the_others(language: str) -> None:
    rewards = Language(language)(list(TEXTS.values()))
    assert rewards == [1.0 if other == language else 0.0 for other in TEXTS]


def test_mixed_text_scores_the_share_of_letters() -> None:
    assert Language("en")(["we 加 it 数字"]) == [4 / 7]
    assert Language("zh")(["we 加 it 数字"]) == [3 / 7]


def test_formulas_code_and_tags_are_ignored() -> None:
    text = "<think>加</think> $x+y$ \\(abc\\) ```print(x)``` `code` \\frac \\boxed{\\text{word}}"
    assert Language("zh")([text]) == [1.0]
    assert Language("en")([r"\boxed{57}", ""]) == [None, None]


def test_unclosed_formulas_take_linear_time() -> None:
    start = time.process_time()
    assert Language("en")([r"\( " * 12_000]) == [None]
    assert time.process_time() - start < 10


def test_column_language_overrides_the_argument() -> None:
    assert Language("en")(["да", "да"], language=["ru", "en"]) == [1.0, 0.0]


def test_unknown_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown code 'english'"):
        Language("english")
    with pytest.raises(ValueError, match="unknown code 'xx'"):
        Language()(["a"], language=["xx"])
