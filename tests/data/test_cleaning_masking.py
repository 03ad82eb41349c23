"""Test what masking finds, and especially what it does not mask."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import CleaningConfig, SourceConfig
from rlqwen.data import load_rows
from rlqwen.data.cleaning.masking import KINDS, mask_text
from rlqwen.data.cleaning.steps import find_outcome

SAMPLES = Path(__file__).parents[1] / "samples"

# Joined at run time, so that secret scanners do not report them.
TOKEN = "a1B2c3D4e5F6g7H8i9J0"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nowIB\n-----END RSA PRIVATE KEY-----"


def masked(text: str) -> str:
    return mask_text(text, KINDS)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to a.b+c@mail-1.example.com.cn.", "Write to [EMAIL]."),
        ("邮箱zhang_san@qq.com，电话13812345678。", "邮箱[EMAIL]，电话[PHONE]。"),
        ("<a@b.io>; mailto:c@d.org", "<[EMAIL]>; mailto:[EMAIL]"),
        ("+86 138-1234-5678/13912345678,15012345678", "[PHONE]/[PHONE],[PHONE]"),
        ("008613812345678 or **138 1234 5678**", "[PHONE] or **[PHONE]**"),
        ("tel=13812345678&x", "tel=[PHONE]&x"),
        ("13812345678 +8613912345678", "[PHONE] [PHONE]"),
        ("(555) 123-4567, 555-123-4567, 555.123.4567, 1-800-555-1212", "[PHONE], [PHONE], [PHONE], [PHONE]"),
        ("+1 (415) 555-2671 and +14155552671.", "[PHONE] and [PHONE]."),
        ("London +44 20 7946 0958, Berlin +49-30-901820", "London [PHONE], Berlin [PHONE]"),
        ("北京010-62345678，深圳(0755)82345678", "北京[PHONE]，深圳[PHONE]"),
        ("卡号4111 1111 1111 1111", "卡号[CREDIT_CARD]"),
        ("378282246310005 or 6200-0000-0000-0005", "[CREDIT_CARD] or [CREDIT_CARD]"),
        ("server 192.168.1.17:8080, 203.0.113.9", "server [IP]:8080, [IP]"),
        ("http://10.20.0.1/x", "http://[IP]/x"),
        ("2001:db8::1 and fe80::1", "[IP] and [IP]"),
        (f"key sk-{TOKEN} and sk-proj-{TOKEN}_x", "key [KEY] and [KEY]"),
        ("AKIA" + "Q3ZT" * 4, "[KEY]"),
        ("ghp_" + "a" * 36, "[KEY]"),
        ("hf_" + "aB" * 17, "[KEY]"),
        (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer [KEY]"),
        (f'"api_key": "{TOKEN}"', '"api_key": "[KEY]"'),
        (f"AWS_SECRET_ACCESS_KEY={TOKEN}/{TOKEN}", "AWS_SECRET_ACCESS_KEY=[KEY]"),
        ("postgres://user:hunter2@db/x", "postgres://user:[KEY]@db/x"),
        (f"eyJ{TOKEN}.eyJ{TOKEN}.{TOKEN}", "[KEY]"),
        (f"before\n{PEM}\nafter", "before\n[KEY]\nafter"),
    ],
)
def test_personal_data_and_secrets_are_masked(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "In 1998-2021 she earned $1,234,567.89, or 3.13812345678 times 2023-10-11.",
        "13000000000 stars; 13812345678元; ￥13812345678; $13812345678",
        "5*13812345678 = 69061728390; 2 + 13812345678; 13812345678 - 6778576; x=(1)-13812345678",
        "472547338\n+960397912423686\n-------",
        "500-100-2000=-1600 and 100-200-3000 * 2",
        "5551234567 is a plain number, 12345678901 too",
        "version 10.2.33.1, v1.22.3.4, Chrome/91.0.44.124, 1.2.3.4, section 10.11.12.13",
        "127.0.0.1, 0.0.0.0, 255.255.255.0, 10.02.03.04, 1.2.3, 300.1.2.3, 1.2.3.4.5",
        "12:30:45, 1:2:3:4:5:6:7:8, a[1::2], std::vector, ab:cd:ef:01:23:45",
        "4111111111111112 (wrong check digit), 1234567812345670 (no issuer), 4212883012996",
        "@app.route('/x'), W@x, user@localhost, a @ b.com, @someone",
        "sk-loading-spinner-container, the Bearer of authentication-tokens-and-more, api_key = os.environ['KEY']",
        "skeleton ghp_short hf_model AKIA123 api_key: <your key here>",
        "+86 people, +5 points, (+1) 234",
        "(1) 2345 - 6789 and f(100) 200-3000",
    ],
)
def test_numbers_versions_and_code_are_not_masked(text: str) -> None:
    assert masked(text) == text


def id_card(first17: str) -> str:
    """Append the check digit, computed with the table of weights of the standard."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(int(digit) * weight for digit, weight in zip(first17, weights, strict=True))
    return first17 + "10X98765432"[total % 11]


def test_an_id_card_number_needs_the_right_check_digit_and_a_real_date() -> None:
    assert id_card("11010519491231002") == "11010519491231002X"  # the example of GB 11643-1999
    assert masked("身份证11010519491231002X。") == "身份证[ID_CARD]。"
    assert masked("11010519491231002x") == "[ID_CARD]"
    assert masked(id_card("44030019900229123")) == id_card("44030019900229123")  # 1990 had no 29 February
    assert masked(id_card("44030019920229123")) == "[ID_CARD]"
    for wrong in "0123456789":
        assert masked(f"11010519491231002{wrong}") == f"11010519491231002{wrong}"
    assert masked("1" + id_card("44030019920229123")) == "1" + id_card("44030019920229123")


def test_few_random_18_digit_numbers_are_masked_as_id_cards() -> None:
    rng = random.Random(0)
    numbers = [str(rng.randrange(10**17, 10**18)) for _ in range(20_000)]
    assert sum(mask_text(number, ["id_card"])[1].total() for number in numbers) <= 2


def test_only_configured_kinds_are_masked_and_counted() -> None:
    text = "a@b.com c@d.com 13812345678"
    assert mask_text(text, ["email"]) == ("[EMAIL] [EMAIL] 13812345678", {"email": 2})
    assert mask_text(text, []) == (text, {})


def test_masking_covers_tool_calls_and_answers_but_not_other_columns() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "mail a@b.com"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "send", "arguments": {"to": ["a@b.com"]}}}],
            },
        ],
        "solution": "a@b.com",
        "source": "a@b.com",
    }
    before = json.dumps(row)
    (found,) = find_outcome([row], None, CleaningConfig(mask=["email"])).masked
    assert json.dumps(row) == before
    assert found.counts == {"email": 3}
    assert found.columns["messages"][0]["content"] == "mail [EMAIL]"
    assert found.columns["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"to": ["[EMAIL]"]}
    assert found.columns["solution"] == "[EMAIL]"
    assert "source" not in found.columns


def test_any_text_can_be_masked_and_masking_is_idempotent() -> None:
    rng = random.Random(0)
    parts = [
        "+",
        "86",
        "13812345678",
        "0",
        "10.",
        "255.",
        ":",
        "fe80",
        "-",
        " ",
        "a@b.com",
        "@",
        "x",
        "=",
        "(555)",
        "4111",
    ]
    for _ in range(5000):
        once = masked("".join(rng.choices(parts, k=rng.randint(1, 12))))
        assert masked(once) == once


def test_masking_time_of_hostile_text_is_linear() -> None:
    """Check that no pattern backtracks without limit; each of these texts would then take minutes."""
    for text in ("1" * 20_000, "+44" + " 1" * 10_000, "a." * 10_000, "a@" + "b." * 10_000, "0:" * 10_000, "sk-" * 7000):
        masked(text)


@pytest.mark.parametrize(
    ("name", "columns", "counts"),
    [
        ("word_problems.jsonl", {"prompt": "question", "completion": "answer"}, {}),
        ("instructions_zh.json", {}, {"ip": 1}),
        ("pairs.json", {}, {"email": 1}),
        ("tools.json", {}, {"email": 4}),
    ],
)
def test_numbers_in_ordinary_text_are_not_masked(name: str, columns: dict[str, Any], counts: dict[str, Any]) -> None:
    """Check that sums, dates, versions and amounts are not masked."""
    rows = load_rows(SourceConfig(path=str(SAMPLES / name), columns=columns), seed=0)
    outcome = find_outcome(rows, None, CleaningConfig(mask=list(KINDS)))
    assert outcome.masked_by_kind("train") == counts
