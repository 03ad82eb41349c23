"""Test that rows of many formats are normalized, and that errors have the row and message number."""

import json
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from rlqwen.data import as_rows
from rlqwen.data.cleaning.texts import Row
from rlqwen.data.formats import normalize_row, to_prompt_row
from rlqwen.errors import DataError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_sharegpt_roles_become_template_roles() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
            {"from": "tool", "value": "2"},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "add"}]',
        "id": 7,
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert normalize_row(row, "row 0") == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "a"},
            {"role": "tool", "content": "2"},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "id": 7,
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "bing", "value": "a"}]},
            r"row 3: message 1 of 'conversations' has the unknown role 'bing'; known roles: human, user, gpt",
        ),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, r"unknown role \['human'\]"),
        ({"conversations": [{"from": "human"}]}, "message 0 of 'conversations' must have 'from' and 'value'"),
        ({"conversations": []}, "must be a list of messages"),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            "message 0 of 'conversations', function_call: must be JSON",
        ),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "needs 'name' and 'arguments'"),
        ({"messages": [{"content": "q"}]}, "message 0 of 'messages' has no 'role'"),
        ({"messages": [{"from": "human", "value": "q"}]}, "belong in a column named 'conversations'"),
        ({"messages": "q"}, "column 'messages' must be a list of messages"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part of type 'image'"),
        ({"messages": TURNS, "tools": "[{"}, "column 'tools' is not valid JSON"),
        ({"messages": TURNS, "tools": ["add"]}, "column 'tools' must be a list of function descriptions"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, "'history' must hold pairs"),
        ({"instruction": "i", "output": {"text": ["o"]}}, "column 'output' must be text, not {'text'"),
        ({"messages": TURNS, "system": ["s"]}, "column 'system' must be text"),
        (
            {"prompt": '[{"role": "user", "content": "q"', "completion": "a"},
            "holds messages as text that is not valid JSON",
        ),
        *(
            (
                {"messages": [*TURNS, {"role": "assistant", "content": "b", key: value}]},
                f"message 2 .*'{key}' must be 0 or 1",
            )
            for key, value in (("weight", 0.5), ("loss_scale", 2), ("loss", "some"), ("train", [1]))
        ),
        (
            {"messages": [*TURNS, {"role": "assistant", "content": "b", "reasoning": "x", "thinking": "y"}]},
            "different thoughts under 'reasoning' and 'thinking'",
        ),
    ],
)
def test_malformed_rows_raise_an_error_with_their_place(row: Row, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        normalize_row(row, "row 3")
    assert str(caught.value).startswith("row 3: ")


def test_alpaca_rows_become_messages() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["h", "i"]], "system": "s", "id": 1}
    assert normalize_row(row, "row 0") == {
        "id": 1,
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "h"},
            {"role": "assistant", "content": "i"},
            {"role": "user", "content": "Add.\n1, 2"},
            {"role": "assistant", "content": "3"},
        ],
    }
    bare = normalize_row({"instruction": "Add.", "input": "", "output": "3"}, "row 0")
    assert bare["messages"][0]["content"] == "Add."


def test_text_parts_are_joined_and_missing_values_removed() -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    assert normalize_row(row | {"label": None}, "row 0") == {"messages": [{"role": "user", "content": "ab"}]}
    call: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [], "reasoning_content": None}
    assert normalize_row({"messages": [call]}, "row 0")["messages"] == [{"role": "assistant", "content": ""}]


def test_normalizing_twice_changes_nothing() -> None:
    once = normalize_row({"conversations": [{"from": "human", "value": "q"}], "tools": "[]"}, "row 0")
    assert normalize_row(once, "row 0") == once


def test_the_prompt_ends_before_the_last_answer_which_becomes_the_solution() -> None:
    expected = {"prompt": TURNS[:1], "solution": "a"}
    assert to_prompt_row({"messages": TURNS}, "row 0") == expected
    assert to_prompt_row({"prompt": TURNS[:1], "completion": TURNS[1:]}, "row 0") == expected
    assert to_prompt_row({"prompt": "q", "completion": "a", "messages": TURNS}, "row 0") == {
        "prompt": "q",
        "solution": "a",
    }
    assert to_prompt_row({"messages": TURNS + TURNS[:1]}, "row 0") == {"prompt": TURNS + TURNS[:1]}
    assert to_prompt_row({"messages": TURNS, "solution": "own"}, "row 0")["solution"] == "own"


def test_a_row_without_a_prompt_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 2: no prompt; .*columns question, answer: map one"):
        to_prompt_row({"question": "q", "answer": "a"}, "row 2")
    with pytest.raises(DataError, match="holds only an answer"):
        to_prompt_row({"messages": TURNS[1:]}, "row 2")


def said(row: dict[str, Any]) -> Any:
    return normalize_row(row, "row 0")


# Columns of their own


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"query": "q", "response": "a"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q"},
        {"instruction": "q"},
    ],
    ids="+".join,
)
def test_a_system_column_becomes_the_first_message_in_every_format(row: dict[str, Any], column: str) -> None:
    prompt = to_prompt_row(said(row | {column: "s"}), "row 0")
    assert prompt == {"prompt": [{"role": "system", "content": "s"}, *TURNS[:1]]} | {
        key: prompt[key] for key in ("solution",) if key in prompt
    }
    assert to_prompt_row(said(row | {column: " "}), "row 0") == to_prompt_row(said(row), "row 0")


def test_a_system_column_that_contradicts_the_messages_is_kept_as_unused() -> None:
    own = [{"role": "system", "content": "own"}, *TURNS]
    assert said({"messages": own, "system": "own"}) == {"messages": own}
    assert said({"messages": own, "system": "other"}) == {"messages": own, "system": "other"}


# Turns


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_always_named_reasoning_content(key: str) -> None:
    turn = {"role": "assistant", "content": "a", key: "easy"}
    (got,) = said({"messages": [turn]})["messages"]
    assert got == {"role": "assistant", "content": "a", "reasoning_content": "easy"}


@pytest.mark.parametrize("key", ["loss", "loss_scale", "weight", "train", "training"])
@pytest.mark.parametrize("no", [False, 0, 0.0, "false"])
def test_a_message_excluded_from_the_loss_is_marked_in_every_format(key: str, no: bool | float | str) -> None:
    marked = {**TURNS[1], "in_loss": False}
    mark = {key: no}
    row: dict[str, Any] = {"messages": [TURNS[0], TURNS[1] | mark, TURNS[0], TURNS[1] | {key: True}]}
    assert said(row)["messages"] == [TURNS[0], marked, *TURNS]
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"} | mark]}
    assert said(row)["messages"] == [TURNS[0], marked]
    row = {"prompt": TURNS[:1], "completion": [TURNS[1] | mark, *TURNS]}
    assert said(row)["completion"] == [marked, *TURNS]
    row = {"instruction": "q", "output": "a", "history": [TURNS[0], TURNS[1] | mark]}
    assert said(row)["messages"] == [TURNS[0], marked, *TURNS]
    assert said(said(row)) == said(row)
    assert to_prompt_row(said({"messages": [TURNS[0], marked, *TURNS]}), "row 0") == {
        "prompt": [*TURNS, TURNS[0]],
        "solution": "a",
    }


def test_a_loss_key_without_effect_is_kept_as_unused() -> None:
    user = TURNS[0] | {"train": True}
    assert said({"messages": [user, TURNS[1]]})["messages"][0] == user


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_openai_messages_in_conversations_keep_calls_and_thoughts() -> None:
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "1"}], "reasoning_content": "add"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    assert said({"conversations": turns}) == said({"messages": turns})
    assert said({"conversation": turns}) == said({"messages": turns})


def test_calls_as_separate_messages_are_merged_into_the_message_before() -> None:
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    row = {
        "messages": [
            *TURNS,
            {"role": "tool_call", "content": call},
            {"role": "tool_call", "content": call},
            {"role": "tool_response", "content": "1"},
        ]
    }
    assert said(row)["messages"] == [
        TURNS[0],
        TURNS[1] | {"tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
    ]


# Values


@pytest.mark.parametrize("missing", [float("nan"), numpy.float64("nan"), numpy.datetime64("NaT"), None], ids=repr)
def test_missing_table_values_are_removed(missing: list[str]) -> None:
    alpaca = {"instruction": "q", "input": missing, "output": "a", "history": missing, "system": missing}
    assert said(alpaca) == {"messages": TURNS}
    assert said({"messages": TURNS, "tools": missing, "note": missing, "of": [missing, {"a": missing}]}) == {
        "messages": TURNS,
        "note": None,
        "of": [None, {"a": None}],
    }
    with pytest.raises(DataError, match="no prompt"):
        to_prompt_row(said({"prompt": missing, "solution": "1"}), "row 0")


def test_missing_values_and_arrays_of_pandas_become_plain_values() -> None:
    pandas = pytest.importorskip("pandas")
    assert said({"prompt": "q", "a": pandas.NA, "b": pandas.NaT}) == {"prompt": "q", "a": None, "b": None}
    filled = numpy.array([{**TURNS[0], "tool_calls": None}, {**TURNS[1], "tool_calls": numpy.array([CALL])}])
    assert said({"messages": filled, "score": numpy.int64(3)}) == {
        "messages": [TURNS[0], TURNS[1] | {"tool_calls": [CALL]}],
        "score": 3,
    }


@pytest.mark.parametrize("write", [json.dumps, str], ids=["JSON", "Python"])
def test_messages_may_be_json_text(write: Callable[[object], str]) -> None:
    assert said({"messages": write(TURNS)}) == {"messages": TURNS}
    assert said({"conversations": write([{"from": "human", "value": "q"}])}) == {"messages": TURNS[:1]}
    assert said({"prompt": write(TURNS[:1]), "completion": write(TURNS[1])}) == {
        "prompt": TURNS[:1],
        "completion": TURNS[1:],
    }


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '{"a": 1}',
        '{"from": "London", "to": "Paris"}',
        '[{"from": "London", "value": 3}]',
        '[{"role": "admin", "content": "x"}]',
        '{"role": "user", "content": "x", "age": 3}',
        '{"content": "x"}',
        '{"role": ["user"], "content": "x"}',
        '{"role": "user"',
        "[]",
    ],
)
def test_json_that_is_not_a_conversation_stays_text(text: str) -> None:
    assert said({"prompt": text, "completion": text}) == {"prompt": text, "completion": text}
    pair = {"prompt": "q", "chosen": text, "rejected": "no"}
    assert said(pair) == pair


# Names of others


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"question": "q", "answer": "a"}, "{prompt: question, solution: answer}"),
        ({"query": "q", "label": "a"}, "{prompt: query}"),
        ({"problem": "q", "solution": "a"}, "{prompt: problem}"),
        ({"input": "q", "output": "a"}, "{prompt: input, solution: output}"),
        ({"id": 1, "title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}}, "{prompt: question}"),
    ],
)
def test_an_unmapped_prompt_is_refused_with_a_suggested_column_map(row: dict[str, Any], mapping: str) -> None:
    with pytest.raises(DataError, match="no prompt; ") as caught:
        to_prompt_row(said(row), "row 0")
    assert f"columns: {mapping} (--column prompt=" in str(caught.value)


def test_a_pandas_table_is_refused_with_what_to_pass_instead() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"instruction": ["q", "q"], "input": ["x", None], "output": ["a", "a"]})
    with pytest.raises(DataError, match=r"a pandas table was given; pass datasets\.Dataset\.from_pandas"):
        as_rows(table)
    assert [row["messages"][0]["content"] for row in as_rows(table.to_dict("records"))] == ["q\nx", "q"]
