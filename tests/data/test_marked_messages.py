"""Test messages that the data excludes from the loss: they stay in the context, and templates do not see the key."""

import copy
from typing import Any

import pytest

from rlqwen.config import DPOConfig, RewardConfig, SFTConfig
from rlqwen.data import tokenize_preferences, tokenize_prompts, tokenize_reward_rows, tokenize_sft
from rlqwen.data.sources import as_rows
from rlqwen.errors import DataError
from rlqwen.models.tiny import build_tokenizer

USER, WRONG, RIGHT = (
    {"role": role, "content": text} for role, text in (("user", "1+1?"), ("assistant", "WRONG"), ("assistant", "2"))
)
MARKS = [
    *({key: no} for key in ("loss", "train", "training") for no in (False, "false")),
    *({key: no} for key in ("weight", "loss_scale") for no in (0, 0.0, "0")),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return a tokenizer whose template writes LEAK if it sees a loss key."""
    own = copy.deepcopy(build_tokenizer())
    own.chat_template = "{%- for m in messages %}{%- if m.in_loss is defined %}LEAK{%- endif %}{%- endfor %}" + str(
        own.chat_template
    )
    return own


def learned(tokenizer: Any, row: dict[str, Any], **options: Any) -> tuple[str, str]:
    """Return (whole text, text in the loss)."""
    (one,), _ = tokenize_sft(as_rows([row]), tokenizer, SFTConfig(**options))
    masked = [token for token, is_in in zip(one.token_ids, one.loss_mask, strict=True) if is_in]
    return tokenizer.decode(one.token_ids), tokenizer.decode(masked)


@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_an_excluded_message_is_not_learned_in_any_format(tokenizer: Any, mark: dict[str, Any]) -> None:
    turns = [USER, WRONG | mark, USER, RIGHT]
    plain = learned(tokenizer, {"messages": [USER, WRONG, USER, RIGHT]})[0]
    named = {"user": "human", "assistant": "gpt"}
    for row in (
        {"messages": turns},
        {
            "conversations": [
                {"from": named[t["role"]], "value": t["content"], **mark} if t == turns[1] else t for t in turns
            ]
        },
        {"prompt": turns[:1], "completion": turns[1:]},
        {"instruction": "1+1?", "output": "2", "history": turns[:2]},
    ):
        text, in_loss = learned(tokenizer, row)
        assert "WRONG" in text
        assert "LEAK" not in text
        assert in_loss.endswith("2<|im_end|>")
        assert "WRONG" not in in_loss
        if "messages" in row:
            assert text == plain


def test_an_excluded_message_is_not_learned_if_all_others_are(tokenizer: Any) -> None:
    text, in_loss = learned(
        tokenizer, {"messages": [USER, WRONG | {"weight": 0}, USER, RIGHT]}, assistant_only_loss=False
    )
    assert "WRONG" in text
    assert "WRONG" not in in_loss
    assert in_loss.count("1+1?") == 2
    with pytest.raises(
        DataError, match="row 0: a message of role 'user' is excluded from the loss, but assistant_only_"
    ):
        learned(tokenizer, {"messages": [USER | {"train": False}, RIGHT]}, assistant_only_loss=False)


def test_a_row_with_only_excluded_messages_is_dropped_and_counted(tokenizer: Any) -> None:
    rows = [{"messages": [USER, WRONG | {"weight": 0}]}, {"messages": [USER, RIGHT]}]
    kept, report = tokenize_sft(as_rows(rows), tokenizer, SFTConfig())
    assert (len(kept), report.rows["empty_mask"]) == (1, [0])


def test_loss_keys_are_not_passed_to_templates_of_pairs_and_prompts(tokenizer: Any) -> None:
    asked = [USER, WRONG | {"weight": 0}, USER]
    pair = {"chosen": [*asked, RIGHT], "rejected": [*asked, WRONG | {"loss": True}]}
    rows = as_rows([pair])
    for (one,), _ in (
        tokenize_preferences(rows, tokenizer, DPOConfig()),
        tokenize_reward_rows(rows, tokenizer, RewardConfig()),
    ):
        assert "LEAK" not in tokenizer.decode(one.prompt_ids + one.chosen.token_ids)
        assert "WRONG" in tokenizer.decode(one.prompt_ids)
    (prompt,), _ = tokenize_prompts(as_rows([{"prompt": asked}]), tokenizer, max_prompt_length=None)
    assert "LEAK" not in tokenizer.decode(prompt.token_ids)
    assert prompt.content == [USER, WRONG, USER]
