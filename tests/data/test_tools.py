"""Test tools and tool calls: all formats are normalized and rendered by the template; calls are learned, results not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rlqwen.config import DPOConfig, SFTConfig, SourceConfig
from rlqwen.data import as_rows, load_rows, tokenize_preferences, tokenize_prompts, tokenize_sft
from rlqwen.data.formats import normalize_row
from rlqwen.errors import DataError
from rlqwen.models.tiny import build_tokenizer, read_trl_template

SAMPLES = Path(__file__).parents[1] / "samples"
USER = {"role": "user", "content": "q"}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
ARGUMENTS = {"a": 1, "b": ["x", None]}
CALL = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
CALL_TEXT = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": ["x", null]}}\n</tool_call>'
BLOCK = "<think>\n\n</think>\n\n"
TOOL_TURNS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "46"},
    {"role": "tool", "content": "47"},
    {"role": "assistant", "content": "a"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def learned(tokenizer: Any, row: Any) -> str:
    return str(tokenizer.decode([token for token, is_in in zip(row.token_ids, row.loss_mask, strict=True) if is_in]))


# Forms


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": ARGUMENTS}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": json.dumps(ARGUMENTS)}}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "function_call": {"name": "add", "arguments": json.dumps(ARGUMENTS)}},
    ],
)
def test_calls_of_every_format_have_their_arguments_as_an_object(turn: dict[str, Any]) -> None:
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for column in ("messages", "prompt", "completion"):
        assert normalize_row({column: [USER, turn]}, "row 0")[column] == [USER, expected]
    pair = normalize_row({"prompt": "q", "chosen": [turn], "rejected": "no"}, "row 0")
    assert (pair["prompt"], pair["chosen"]) == ([USER], [expected])


def test_sharegpt_calls_are_read_in_conversations_and_in_answers() -> None:
    call = {"from": "function_call", "value": json.dumps({"name": "add", "arguments": json.dumps(ARGUMENTS)})}
    row = {"conversations": [{"from": "human", "value": "q"}], "chosen": call, "rejected": {"from": "gpt", "value": ""}}
    assert normalize_row(row, "row 0")["chosen"] == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    both = {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)}
    turns = normalize_row({"conversations": [both, {"from": "observation", "value": "1"}]}, "row 0")["messages"]
    assert turns == [{"role": "assistant", "content": "", "tool_calls": [CALL] * 2}, {"role": "tool", "content": "1"}]


def test_call_ids_function_results_and_calls_without_arguments_are_read() -> None:
    turns = [
        {"role": "assistant", "tool_calls": [{"id": "7", "function": {"name": "now", "arguments": ""}}]},
        {"role": "function", "name": "now", "content": "1"},
    ]
    assert normalize_row({"messages": turns}, "row 0")["messages"] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "7", "type": "function", "function": {"name": "now", "arguments": {}}}],
        },
        {"role": "tool", "name": "now", "content": "1"},
    ]


@pytest.mark.parametrize("tools", [[TOOL], TOOL, [TOOL["function"]], json.dumps([TOOL["function"]])])
def test_tools_have_the_format_that_serving_gives_to_the_template(tools: Any) -> None:
    assert normalize_row({"messages": [USER], "tools": tools}, "row 0")["tools"] == [TOOL]


def test_nulls_added_by_arrow_are_removed_and_nulls_of_the_data_are_kept() -> None:
    other = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
    rows = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [one]}]} for one in (CALL, other)]
    tables = as_rows(Dataset.from_list([{"messages": [row["messages"][1]]} for row in rows]))
    calls = [row["messages"][0]["tool_calls"][0]["function"]["arguments"] for row in tables]
    assert calls[1] == {"zone": "UTC"}
    own = {"name": "add", "arguments": {"a": None}}
    assert as_rows([{"messages": [{"role": "assistant", "tool_calls": [own]}]}])[0]["messages"][0]["tool_calls"][0][
        "function"
    ] == {"name": "add", "arguments": {"a": None}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"arguments": {}}, "message 0 of 'messages', tool_calls: a call needs 'name' and 'arguments'"),
        ({"name": "add"}, "a call needs 'name' and 'arguments'"),
        ("add", "must be JSON"),
        ({"name": "add", "arguments": "a=1"}, "tool_calls, arguments of 'add': must be JSON .*'a=1'"),
        ({"name": "add", "arguments": [1]}, r"arguments of 'add' must be an object: \[1\]"),
    ],
)
def test_malformed_calls_raise_an_error_with_their_place(call: str | dict[str, Any], message: str) -> None:
    calls = call if isinstance(call, str) else [call]
    with pytest.raises(DataError, match=message):
        normalize_row({"messages": [{"role": "assistant", "tool_calls": calls}]}, "row 0")


# Tokens


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_calls_are_learned_and_grouped_tool_results_are_not(tokenizer: Any, tmp_path: Path, template: str) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(read_trl_template(template))
    row = {"messages": TOOL_TURNS, "tools": [TOOL]}
    (out,), _ = tokenize_sft([row], tokenizer, SFTConfig(chat_template_path=str(path), max_length=None))
    block = BLOCK if template == "qwen3" else ""
    assert learned(tokenizer, out) == f"{CALL_TEXT}\n{CALL_TEXT}<|im_end|>{block}a<|im_end|>"
    text = tokenizer.decode(out.token_ids)
    results = "<tool_response>\n46\n</tool_response>\n<tool_response>\n47\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n{block}a<|im_end|>" in text
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text


def test_pairs_and_prompts_have_tools_too(tokenizer: Any) -> None:
    pair = {
        "prompt": [USER],
        "chosen": TOOL_TURNS[1:],
        "rejected": [{"role": "assistant", "content": "I can't."}],
        "tools": [TOOL["function"]],
    }
    (row,), _ = tokenize_preferences([pair], tokenizer, DPOConfig(max_length=None))
    # The turn that answers the prompt is rendered as a last turn, even if messages follow it.
    assert learned(tokenizer, row.chosen) == f"{BLOCK}{CALL_TEXT}\n{CALL_TEXT}<|im_end|>{BLOCK}a<|im_end|>"
    assert tokenizer.decode(row.chosen.token_ids).count("<tool_response>") == 2
    (prompt,), _ = tokenize_prompts([{"prompt": [USER], "tools": [TOOL]}], tokenizer, max_prompt_length=None)
    assert prompt.token_ids == row.prompt_ids
    assert json.dumps(TOOL) in tokenizer.decode(prompt.token_ids)
    (later,), _ = tokenize_prompts([{"prompt": TOOL_TURNS[:4], "tools": [TOOL]}], tokenizer, max_prompt_length=None)
    expected = tokenizer.apply_chat_template(
        TOOL_TURNS[:4], tools=[TOOL], add_generation_prompt=True, return_dict=False
    )
    assert later.token_ids == expected
    turns = {"prompt": TOOL_TURNS[:4], "chosen": "a", "rejected": "b", "tools": [TOOL]}
    (row,), _ = tokenize_preferences([turns], tokenizer, DPOConfig(max_length=None))
    assert row.prompt_ids == expected


def test_a_template_that_drops_tools_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    )
    config = SFTConfig(chat_template_path=str(path))
    with pytest.raises(DataError, match="row 0: a message has tool calls, but the chat template writes none"):
        tokenize_sft([{"messages": TOOL_TURNS}], tokenizer, config)
    with pytest.raises(DataError, match="row 0: the row has tools, but the chat template writes none"):
        tokenize_sft([{"messages": [USER, TOOL_TURNS[-1]], "tools": [TOOL]}], tokenizer, config)


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
def test_whole_tool_conversations_are_rendered_as_the_template_does(
    tokenizer: Any, tmp_path: Path, template: str
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(read_trl_template(template))
    file = SAMPLES / "tools.json"
    raw = json.loads(file.read_text("utf-8"))
    rows = load_rows(SourceConfig(path=str(file)), seed=0)
    sequences, report = tokenize_sft(rows, tokenizer, SFTConfig(chat_template_path=str(path), max_length=None))
    assert (report.num_kept, report.eos_in_loss) == (10, 1.0)
    num_calls = 0
    for given, row, sequence in zip(raw, rows, sequences, strict=True):
        text = tokenizer.decode(sequence.token_ids)
        own = tokenizer.apply_chat_template(
            row["messages"], tools=row["tools"] or None, chat_template=path.read_text(), tokenize=False
        )
        assert text == own.rstrip("\n")
        calls = [json.loads(t["value"]) for t in given["conversations"] if t["from"] == "function_call"]
        answers = [t["value"] for t in given["conversations"] if t["from"] == "gpt"]
        said = learned(tokenizer, sequence)
        assert [json.loads(one) for one in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", said, re.DOTALL)] == calls
        assert re.sub(
            r"<tool_call>.*?</tool_call><\|im_end\|>", "", said.replace(BLOCK, ""), flags=re.DOTALL
        ) == "".join(f"{answer}<|im_end|>" for answer in answers)
        num_calls += len(calls)
    assert num_calls == 8
