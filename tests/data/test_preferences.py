"""Test preference rows: every format is normalized, both answers share a prompt, and loss and truncation are right."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import DPOConfig, RewardConfig, SFTConfig, SourceConfig
from rlqwen.data import load_rows, tokenize_labelled, tokenize_preferences, tokenize_reward_rows, tokenize_sft
from rlqwen.data.cleaning.texts import Row
from rlqwen.data.formats import add_system_prompt, normalize_row
from rlqwen.data.preference_tokenization import PairJob
from rlqwen.errors import DataError
from rlqwen.models.tiny import build_tokenizer, read_trl_template

SAMPLES = Path(__file__).parents[1] / "samples"
USER = {"role": "user", "content": "q"}
BLOCK = "<think>\n\n</think>\n\n"
SYSTEM = {"role": "system", "content": "s"}
PAIR = {
    "prompt": [USER],
    "chosen": [{"role": "assistant", "content": "1"}],
    "rejected": [{"role": "assistant", "content": "2"}],
}
TEXT_PAIR = {"prompt": "q", "chosen": "1", "rejected": "2"}
TEXTS = {"prompt": "1 +", "chosen": " 1 = 2", "rejected": " 1 = 3"}


def say(*contents: str) -> list[dict[str, str]]:
    """Return alternating messages that begin with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def answer(*contents: str) -> list[dict[str, str]]:
    """Return alternating messages that begin with the assistant."""
    return say("", *contents)[1:]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def one(tokenizer: Any, row: dict[str, Any], **options: Any) -> tuple[str, str, str]:
    """Return (prompt, chosen, rejected) as text; text of an answer outside the loss is in parentheses."""
    (pair,), _ = tokenize_preferences([row], tokenizer, DPOConfig(**options))

    def show(row: Any) -> str:
        text, was_in = "", True
        for token, is_in in zip(row.token_ids, row.loss_mask, strict=True):
            text += "(" * (was_in and not is_in) + ")" * (is_in and not was_in) + tokenizer.decode([token])
            was_in = is_in
        return text

    return tokenizer.decode(pair.prompt_ids), show(pair.chosen), show(pair.rejected)


# Forms


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": "q", "chosen": answer("1"), "rejected": answer("2")},
        {"prompt": [USER], "chosen": "1", "rejected": {"role": "assistant", "content": "2"}},
        {"prompt": "q", "chosen": say("q", "1"), "rejected": say("q", "2")},
        {"prompt": [USER], "chosen": say("q", "1"), "rejected": answer("2")},
        {"chosen": say("q", "1"), "rejected": say("q", "2")},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "1"},
            "rejected": [{"from": "gpt", "value": "2"}],
        },
        {"conversations": [{"from": "human", "value": "q"}], "chosen": "1", "rejected": "2"},
        {"messages": [USER], "chosen": answer("1")[0], "rejected": answer("2")[0]},
        {"messages": say("q", "1"), "chosen": answer("1"), "rejected": answer("2")},
        {"chosen": "\n\nHuman: q\n\nAssistant: 1", "rejected": "\n\nHuman: q\n\nAssistant: 2"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " 1", "rejected": " 2"},
        {"instruction": "q", "input": "", "chosen": "1", "rejected": "2"},
        {"messages": say("q", "1"), "rejected_response": "2"},
        {"messages": say("q", "1"), "rejected_messages": say("q", "2")},
        {"query": "q", "response": "1", "rejected_response": "2"},
        {"chosen": json.dumps(say("q", "1")), "rejected": json.dumps(say("q", "2"))},
        {"prompt": json.dumps([USER]), "chosen": json.dumps(answer("1")), "rejected": str(answer("2"))},
        {"input": {"messages": [USER]}, "preferred_output": answer("1"), "non_preferred_output": answer("2")},
    ],
    ids=lambda row: "+".join(row),
)
def test_every_preference_format_becomes_a_prompt_and_two_answers(row: Row) -> None:
    before = json.dumps(row)
    once = normalize_row(row, "row 0")
    assert once == PAIR
    assert normalize_row(once, "row 0") == once
    assert json.dumps(row) == before


def test_extra_columns_of_a_format_are_kept() -> None:
    row: dict[str, Any] = {
        "conversations": [{"from": "human", "value": "q"}], "chosen": "1", "rejected": "2", "system": "s",
    }  # fmt: skip
    assert normalize_row(row | {"id": 3}, "row 0") == PAIR | {"prompt": [SYSTEM, USER], "id": 3}
    for row in (PAIR, {"chosen": say("q", "1"), "rejected": say("q", "2")}, TEXT_PAIR):
        assert normalize_row(row | {"system": "s"}, "row 0") == PAIR | {"prompt": [SYSTEM, USER]}
    row = {"messages": say("q", "1"), "rejected_response": "2", "system": "s"}
    assert normalize_row(row, "row 0") == PAIR | {"prompt": [SYSTEM, USER]}
    alpaca = {"instruction": "q", "history": [["a", "b"]], "system": "s", "chosen": "1", "rejected": "2"}
    assert normalize_row(alpaca, "row 0")["prompt"] == [SYSTEM, *say("a", "b", "q")]
    ultra = {"prompt": "q", "messages": say("q", "1"), "chosen": say("q", "1"), "rejected": say("q", "2")}
    assert normalize_row(ultra, "row 0") == PAIR | {"messages": say("q", "1")}


def test_an_explicit_prompt_may_lack_the_system_message_or_be_the_only_one_with_it() -> None:
    whole = {"chosen": [SYSTEM, *say("q", "1")], "rejected": [SYSTEM, *say("q", "2")]}
    expected = PAIR | {"prompt": [SYSTEM, USER]}
    assert normalize_row({"prompt": " q\n", **whole}, "row 0") == expected
    bare = {"chosen": say("q", "1"), "rejected": say("q", "2")}
    assert normalize_row({"prompt": [SYSTEM, USER], **bare}, "row 0") == expected


def test_an_implicit_prompt_ends_at_the_first_message_that_differs() -> None:
    row = {"chosen": say("q", "1", "r", "2"), "rejected": say("q", "1", "r", "3")}
    assert normalize_row(row, "row 0") == {
        "prompt": say("q", "1", "r"),
        "chosen": answer("2"),
        "rejected": answer("3"),
    }
    row = {"chosen": say("q", "1", "r", "2"), "rejected": say("q", "x")}
    assert normalize_row(row, "row 0") == {
        "prompt": [USER],
        "chosen": answer("1", "r", "2"),
        "rejected": answer("x"),
    }
    row = {"chosen": say("q", "1", "r", "2"), "rejected": say("q", "1")}
    assert normalize_row(row, "row 0")["rejected"] == answer("1")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("12 + 1 = 13", "12 + 1 = 14", "12 + 1 ="),
        ("a b", "a b c", "a"),
        ("yes", "no", ""),
        ("yes", "yes", ""),
        ("2\n3", "2\n4", "2"),
    ],
)
def test_texts_without_a_prompt_use_their_common_words_as_prompt(chosen: str, rejected: str, prompt: str) -> None:
    row = normalize_row({"chosen": chosen, "rejected": rejected}, "row 0")
    assert row["prompt"] == prompt
    assert (prompt + row["chosen"], prompt + row["rejected"]) == (chosen, rejected)
    if prompt:
        assert normalize_row({"question": prompt, "chosen": chosen, "rejected": rejected}, "row 0")["prompt"] == prompt


def test_the_margin_is_given_or_computed_from_scores() -> None:
    assert normalize_row(PAIR | {"margin": "0.5"}, "row 0")["margin"] == 0.5
    scored = {"score_chosen": 8.5, "score_rejected": 6}
    assert normalize_row(PAIR | scored, "row 0")["margin"] == 2.5
    assert normalize_row(PAIR | scored | {"margin": 1}, "row 0")["margin"] == 1.0
    assert "margin" not in normalize_row(PAIR | {"margin": float("nan")}, "row 0")
    with pytest.raises(DataError, match="row 0: column 'score_chosen' must be a finite number, not 'high'"):
        normalize_row(PAIR | scored | {"score_chosen": "high"}, "row 0")


def test_a_system_prompt_and_a_column_map_work_for_pairs(tmp_path: Path) -> None:
    expected = PAIR | {"prompt": [SYSTEM, USER]}
    assert add_system_prompt(PAIR, "s", "row 0") == expected
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "q", "good": "1", "bad": "2"}))
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert load_rows(SourceConfig(path=str(path), columns=columns, system_prompt="s"), seed=0) == [expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "1"}, r"no 'rejected' answer; .* has prompt, chosen: map them"),
        ({"prompt": "q", "chosen": "1", "rejected": None}, "no 'rejected' answer"),
        ({"messages": say("q", "1")}, "no 'chosen' answer"),
        (PAIR | {"chosen": []}, "column 'chosen' must be a list of messages"),
        (PAIR | {"chosen": 3}, "column 'chosen' must be a list of messages, not 3"),
        (PAIR | {"rejected": [{"content": "2"}]}, "message 0 of 'rejected' has no 'role'"),
        (PAIR | {"chosen": {"from": "bing", "value": "1"}}, "message 0 of 'chosen' has the unknown role 'bing'"),
        ({"chosen": say("q", "1"), "rejected": "2"}, "one of 'chosen' and 'rejected' is text and the other messages"),
        (
            {"chosen": say("q", "1"), "rejected": say("r", "2")},
            "prompts of 'chosen' and 'rejected' differ: message 0 of 'chosen' .* its role is 'user': 'q'",
        ),
        ({"chosen": say("q", "1", "r", "2"), "rejected": say("q", "1", "t", "3")}, "differ: message 2 of 'chosen'"),
        ({"chosen": answer("1"), "rejected": answer("2")}, "have no common beginning, and there is no 'prompt'"),
        (
            {"prompt": "x", "chosen": say("q", "1"), "rejected": say("q", "2")},
            "begin with another prompt than 'prompt': 'q' and 'x'",
        ),
        (PAIR | {"chosen": say("x", "1")}, "'chosen' must be an answer to 'prompt', but it begins with .* 'user': 'x'"),
        (PAIR | {"chosen": say("q")}, "'chosen' holds the prompt and no answer"),
        ({"input": "q", "preferred_output": [], "non_preferred_output": []}, "must have 'messages': 'q'"),
        (PAIR | {"margin": float("inf")}, "column 'margin' must be a finite number"),
        *(
            ({name: "What is 1+1?", "chosen": "The answer is 2", "rejected": "The answer is 3"}, message)
            for name in ("question", "query", "input", "problem")
            for message in [rf"seems to be in the column '{name}', .* columns: {{prompt: {name}}}"]
        ),
        (
            {"question": "q", "chosen": answer("1"), "rejected": answer("2")},
            "the column 'question', which is not mapped",
        ),
        ({"system": "s", "chosen": "a b", "rejected": "a c"}, "a system prompt needs a 'prompt'"),
        (
            {"question": "q", "chosen_response": "1", "rejected_response": "2"},
            "columns: {prompt: question, chosen: chosen_",
        ),
    ],
)
def test_malformed_pairs_raise_an_error_with_their_place(tokenizer: Any, row: Row, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        tokenize_preferences([PAIR, row], tokenizer, DPOConfig())
    assert str(caught.value).startswith("row 1: ")


# Tokens


def test_text_is_not_changed_and_each_answer_ends_in_eos(tokenizer: Any) -> None:
    (pair,), report = tokenize_preferences([TEXTS | {"margin": 2}], tokenizer, DPOConfig())
    assert tokenizer.convert_ids_to_tokens(pair.prompt_ids) == ["1", "Ġ+"]
    assert tokenizer.convert_ids_to_tokens(pair.chosen.token_ids) == ["Ġ", "1", "Ġ=", "Ġ", "2", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(pair.rejected.token_ids) == ["Ġ", "1", "Ġ=", "Ġ", "3", "<|im_end|>"]
    assert pair.chosen.loss_mask == pair.rejected.loss_mask == [True] * 6
    assert (pair.index, pair.margin) == (0, 2.0)
    assert (report.num_tokens, report.num_loss_tokens, report.eos_in_loss) == (14, 12, 1.0)
    assert report.lengths["max"] == 8
    assert one(tokenizer, TEXTS, eos_token="<|endoftext|>")[1] == " 1 = 2<|endoftext|>"


def test_texts_without_a_common_prefix_have_no_prompt_and_no_loss_on_the_first_token(tokenizer: Any) -> None:
    assert one(tokenizer, {"chosen": "13", "rejected": "4"}) == ("", "(1)3<|im_end|>", "(4)<|im_end|>")


def test_a_conversation_is_split_after_the_generation_prompt(tokenizer: Any) -> None:
    (pair,), _ = tokenize_preferences([PAIR], tokenizer, DPOConfig())
    special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    user, assistant, line, q, digit = (tokenizer.convert_tokens_to_ids(t) for t in ("user", "assistant", "Ċ", "q", "1"))
    assert pair.prompt_ids == [special[0], user, line, q, special[1], line, special[0], assistant, line]
    block = tokenizer.convert_tokens_to_ids(["<think>", "ĊĊ", "</think>", "ĊĊ"])
    assert pair.chosen.token_ids == [*block, digit, special[1]]
    assert pair.rejected.token_ids == [*block, digit + 1, special[1]]
    assert pair.chosen.loss_mask == pair.rejected.loss_mask == [True] * 6


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_5_think", "qwen3_5_nothink"])
def test_prompt_and_answer_equal_those_of_sft(tokenizer: Any, tmp_path: Path, template: str) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(read_trl_template(template))
    options = {"chat_template_path": str(path), "chat_template_kwargs": {"enable_thinking": True}}
    thought = "<think>\n1\n</think>\n\n2"
    row = {"prompt": [SYSTEM, *say("q", "a", "r")], "chosen": answer(thought), "rejected": answer("3", "t", thought)}
    (pair,), _ = tokenize_preferences([row], tokenizer, DPOConfig(**options))
    for side in ("chosen", "rejected"):
        (whole,), _ = tokenize_sft(
            [{"prompt": row["prompt"], "completion": row[side]}], tokenizer, SFTConfig(**options)
        )
        made = getattr(pair, side)
        assert pair.prompt_ids + made.token_ids == whole.token_ids
        assert [False] * len(pair.prompt_ids) + made.loss_mask == whole.loss_mask
        assert made.loss_mask[0]


def test_user_messages_inside_an_answer_are_not_in_the_loss(tokenizer: Any) -> None:
    row = {"prompt": [USER], "chosen": answer("1", "r", "2"), "rejected": answer("3", "r")}
    prompt, chosen, rejected = one(tokenizer, row)
    between = "(\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n)"
    assert prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert chosen == f"{BLOCK}1<|im_end|>{between}{BLOCK}2<|im_end|>"
    assert rejected == f"{BLOCK}3<|im_end|>"


def test_the_prompt_equals_serving_even_if_the_template_renders_it_by_its_answer(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'user' and messages|length > 3 %}*{% endif %}"
        "{{ '\\n' + m.content }}<|im_end|>{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"prompt": [USER], "chosen": answer("1"), "rejected": answer("2", "r", "3")}
    prompt, chosen, rejected = one(tokenizer, row, chat_template_path=str(path))
    assert prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert chosen == "1<|im_end|>"
    assert rejected == "2<|im_end|>(\n<|im_start|>user*\nr<|im_end|>\n<|im_start|>assistant\n)3<|im_end|>"


# Cuts and counts


def test_keep_start_truncates_the_end_of_the_answers(tokenizer: Any) -> None:
    row = TEXTS | {"rejected": " 13"}
    assert one(tokenizer, row, max_length=5) == ("1 +", " 1 =", " 13")
    _, report = tokenize_preferences([row, TEXTS], tokenizer, DPOConfig(max_length=7))
    assert (report.num_kept, report.num_truncated, report.eos_in_loss) == (2, 2, 0.25)
    with pytest.raises(DataError, match=r"none of 1 rows .*1 have an answer with no token in the loss within max_l"):
        tokenize_preferences([row], tokenizer, DPOConfig(max_length=2))


def test_keep_end_truncates_the_beginning_of_the_shared_prompt(tokenizer: Any) -> None:
    row = {"prompt": "123456", "chosen": "7", "rejected": "890"}
    options = {"truncation_mode": "keep_end"}
    assert one(tokenizer, row, max_length=7, **options) == ("456", "7<|im_end|>", "890<|im_end|>")
    assert one(tokenizer, row, max_length=5, **options)[0] == "6"
    with pytest.raises(DataError, match="1 are longer than max_length=4"):
        tokenize_preferences([row], tokenizer, DPOConfig(max_length=4, **options))


def test_drop_removes_long_pairs_and_is_the_default_of_reward_models(tokenizer: Any) -> None:
    rows = [TEXTS, TEXTS | {"rejected": " 1 = 333"}]
    for config in (DPOConfig(max_length=8, truncation_mode="drop"), RewardConfig(max_length=8)):
        pairs, report = tokenize_preferences(rows, tokenizer, config)
        assert [pair.index for pair in pairs] == [0]
        assert (report.num_overlong, report.num_truncated, report.lengths["max"]) == (1, 0, 10)


def test_a_long_prompt_is_truncated_at_its_beginning(tokenizer: Any) -> None:
    row = {"prompt": "123456", "chosen": "7", "rejected": "890"}
    assert one(tokenizer, row, max_prompt_length=2) == ("56", "7<|im_end|>", "890<|im_end|>")
    assert one(tokenizer, row, max_prompt_length=2, max_length=6, truncation_mode="drop")[0] == "56"
    assert tokenize_preferences([row], tokenizer, DPOConfig(max_prompt_length=2))[1].num_truncated == 1
    assert tokenize_preferences([row], tokenizer, DPOConfig(max_prompt_length=6))[1].num_truncated == 0


def test_pairs_with_equal_answers_are_dropped_and_reported(tokenizer: Any) -> None:
    equal = PAIR | {"rejected": PAIR["chosen"]}
    pairs, report = tokenize_preferences([equal, PAIR, equal], tokenizer, DPOConfig())
    assert [pair.index for pair in pairs] == [1]
    assert report.num_equal_sides == 2
    assert "2 dropped for equal answers" in report.summary()
    assert report.warnings == ["dropped pairs with equal answers, which teach nothing: row 0, row 2"]
    # Answers that differ only in their truncated part.
    _, report = tokenize_preferences([TEXTS, TEXTS | {"chosen": " 2"}], tokenizer, DPOConfig(max_length=5))
    assert (report.num_kept, report.num_equal_sides) == (1, 1)
    with pytest.raises(DataError, match="none of 1 rows has anything to learn from: 1 have equal answers"):
        tokenize_preferences([equal], tokenizer, DPOConfig())


def test_a_reward_model_uses_the_configured_template(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(tokenizer.chat_template)
    bare = build_tokenizer()
    bare.chat_template = None
    (pair,), _ = tokenize_reward_rows([PAIR], bare, RewardConfig(chat_template_path=str(path)))
    assert [pair] == tokenize_reward_rows([PAIR], tokenizer, RewardConfig())[0]
    assert bare.chat_template is None


def test_empty_answers_are_found_after_plain_text_rows(tokenizer: Any) -> None:
    job = PairJob(tokenizer, DPOConfig())
    job.run(0, [TEXTS], None)
    _, stats = job.run(1, [PAIR | {"rejected": answer("")}], None)
    assert stats.report.rows["empty_answer"] == [1]


def test_empty_answers_and_negative_margins_are_kept_with_a_warning(tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [PAIR | {"rejected": answer("")}, TEXTS | {"chosen": "", "margin": -1}]
    pairs, report = tokenize_preferences(rows, tokenizer, DPOConfig())
    assert [tokenizer.decode(row.token_ids) for row in (pairs[0].rejected, pairs[1].chosen)] == [
        f"{BLOCK}<|im_end|>",
        "<|im_end|>",
    ]
    assert [line for line in report.warnings if "plain text" not in line] == [
        "empty answers, which teach the model to end its turn at once: row 0, row 1",
        "margins below 0, as if the rejected answer were better: row 1",
    ]


def test_an_empty_dataset_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the dataset is empty"):
        tokenize_preferences([], tokenizer, DPOConfig())


# Labels


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": answer("1"), "label": True},
        {"prompt": [USER], "completion": "1", "label": "TRUE"},
        {"messages": say("q", "1"), "label": 1},
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "1"}],
            "kto_tag": True,
        },
        {"instruction": "q", "output": "1", "kto_tag": "true"},
    ],
    ids=lambda row: "+".join(row),
)
def test_labelled_answers_of_every_format_are_read(tokenizer: Any, row: dict[str, Any]) -> None:
    bad = {"prompt": [USER], "completion": answer("2"), "label": False}
    (good, other), report = tokenize_labelled([row, bad], tokenizer, DPOConfig())
    (pair,), _ = tokenize_preferences([PAIR], tokenizer, DPOConfig())
    assert (good.index, good.prompt_ids, good.completion, good.label) == (0, pair.prompt_ids, pair.chosen, True)
    assert (other.index, other.prompt_ids, other.completion, other.label) == (1, pair.prompt_ids, pair.rejected, False)
    assert report.warnings == []


def test_a_pair_gives_two_labelled_answers(tokenizer: Any) -> None:
    labelled, report = tokenize_labelled([PAIR, TEXTS], tokenizer, DPOConfig())
    assert [(row.index, row.label) for row in labelled] == [(0, True), (0, False), (1, True), (1, False)]
    assert tokenizer.decode(labelled[3].completion.token_ids) == " 1 = 3<|im_end|>"
    assert (report.num_rows, report.num_kept) == (2, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "completion": "1"}, r"row 0: no 'label'; .*has prompt, completion: map one"),
        ({"prompt": "q", "completion": "1", "label": "maybe"}, "row 0: 'label' must be true or false, not 'maybe'"),
        ({"messages": say("q"), "label": True}, "row 0: no answer to label; .*has messages, label"),
        ({"prompt": "q", "label": True}, "row 0: no answer to label"),
    ],
)
def test_malformed_labelled_rows_raise_an_error_with_their_place(
    tokenizer: Any, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_labelled([row], tokenizer, DPOConfig())


def test_equal_labels_give_a_warning(tokenizer: Any) -> None:
    row = {"prompt": "q", "completion": "1", "label": False}
    assert tokenize_labelled([row], tokenizer, DPOConfig())[1].warnings[1:] == [
        "all labels are false: good and bad answers cannot be told apart"
    ]


# Whole conversations


def test_pairs_of_whole_conversations_are_learned_completely(tokenizer: Any) -> None:
    path = SAMPLES / "pairs.json"
    rows = load_rows(SourceConfig(path=str(path)), seed=0)
    pairs, report = tokenize_preferences(rows, tokenizer, DPOConfig(max_length=None))
    assert (report.num_kept, report.eos_in_loss, report.num_truncated) == (13, 1.0, 0)
    for raw, pair in zip(json.loads(path.read_text("utf-8")), pairs, strict=True):
        prompt = tokenizer.decode(pair.prompt_ids)
        assert prompt.count("<|im_start|>") == len(raw["conversations"]) + 1
        assert prompt.endswith(f"user\n{raw['conversations'][-1]['value']}<|im_end|>\n<|im_start|>assistant\n")
        for side in ("chosen", "rejected"):
            row = getattr(pair, side)
            assert tokenizer.decode(row.token_ids) == BLOCK + raw[side]["value"] + "<|im_end|>"
            assert all(row.loss_mask)
    cut, report = tokenize_preferences(rows, tokenizer, DPOConfig(max_length=96))
    assert report.num_truncated > 0
    assert report.num_kept + report.num_empty_mask + report.num_equal_sides == 13
    assert max(len(pair.prompt_ids) + len(pair.chosen.token_ids) for pair in cut) == 96
