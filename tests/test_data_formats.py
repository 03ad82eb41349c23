"""Rows of many forms become one; what can't be read is named with its row and turn."""

import pytest

from rlqwen.data.formats import normalise_row, to_prompt_row
from rlqwen.errors import DataError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_sharegpt_roles_become_the_templates():
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
    assert normalise_row(row, "row 0") == {
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
            r"row 3: turn 1 of 'conversations' has the unknown role 'bing'; known roles: human, user, gpt",
        ),
        ({"conversations": [{"from": "human"}]}, "turn 0 of 'conversations' must have 'from' and 'value'"),
        ({"conversations": []}, "must be a list of turns"),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            "turn 0 of 'conversations', function_call: must be JSON",
        ),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "needs 'name' and 'arguments'"),
        ({"messages": [{"content": "q"}]}, "turn 0 of 'messages' has no 'role'"),
        ({"messages": [{"from": "human", "value": "q"}]}, "belong in a column named 'conversations'"),
        ({"messages": "q"}, "column 'messages' must be a list of turns"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 0 of 'prompt': content must be text"),
        ({"messages": TURNS, "tools": "[{"}, "column 'tools' is not valid JSON"),
        ({"messages": TURNS, "tools": ["add"]}, "column 'tools' must be a list of function descriptions"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, "'history' must hold pairs"),
    ],
)
def test_malformed_rows_are_named(row, message):
    with pytest.raises(DataError, match=message) as caught:
        normalise_row(row, "row 3")
    assert str(caught.value).startswith("row 3: ")


def test_alpaca_rows_become_messages():
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["h", "i"]], "system": "s", "id": 1}
    assert normalise_row(row, "row 0") == {
        "id": 1,
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "h"},
            {"role": "assistant", "content": "i"},
            {"role": "user", "content": "Add.\n1, 2"},
            {"role": "assistant", "content": "3"},
        ],
    }
    bare = normalise_row({"instruction": "Add.", "input": "", "output": "3"}, "row 0")
    assert bare["messages"][0]["content"] == "Add."


def test_parts_of_text_are_joined_and_missing_values_left_out():
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    assert normalise_row(row | {"label": None}, "row 0") == {"messages": [{"role": "user", "content": "ab"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [], "reasoning_content": None}
    assert normalise_row({"messages": [call]}, "row 0")["messages"] == [{"role": "assistant", "content": ""}]


def test_normalising_twice_changes_nothing():
    once = normalise_row({"conversations": [{"from": "human", "value": "q"}], "tools": "[]"}, "row 0")
    assert normalise_row(once, "row 0") == once


def test_a_prompt_is_what_comes_before_the_last_answer_and_the_answer_is_the_solution():
    expected = {"prompt": TURNS[:1], "solution": "a"}
    assert to_prompt_row({"messages": TURNS}, "row 0") == expected
    assert to_prompt_row({"prompt": TURNS[:1], "completion": TURNS[1:]}, "row 0") == expected
    assert to_prompt_row({"prompt": "q", "completion": "a", "messages": TURNS}, "row 0") == {
        "prompt": "q",
        "solution": "a",
    }
    assert to_prompt_row({"messages": TURNS + TURNS[:1]}, "row 0") == {"prompt": TURNS + TURNS[:1]}
    assert to_prompt_row({"messages": TURNS, "solution": "own"}, "row 0")["solution"] == "own"


def test_a_row_without_a_prompt_is_refused():
    with pytest.raises(DataError, match=r"row 2: no prompt; .*columns question, answer: map one"):
        to_prompt_row({"question": "q", "answer": "a"}, "row 2")
    with pytest.raises(DataError, match="holds nothing but an answer"):
        to_prompt_row({"messages": TURNS[1:]}, "row 2")
