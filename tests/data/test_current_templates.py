"""Test the chat templates of Qwen3.5, 3.6, 3.8 and Instruct-2507: tokens of rows equal those of the template.

A prompt ends in the generation prompt, and what the model writes after it is tokenized apart: expected ids are those of
the template's text, cut behind each `<think>` that the prompt opens.
"""

import io
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset
from rlqwen_rewards.accuracy import Accuracy
from rlqwen_rewards.format import Format
from rlqwen_rewards.tag_count import TagCount

from rlqwen.config import DPOConfig, RewardConfig, SFTConfig, SourceConfig
from rlqwen.data import (
    as_rows,
    load_rows,
    reward_model_segments,
    tokenize_conversation,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_reward_rows,
    tokenize_sft,
)
from rlqwen.errors import DataError
from rlqwen.models.tiny import build_tokenizer
from rlqwen.rollout.engines.transformers import TransformersEngine
from rlqwen.types import Message

Turn = dict[str, Any]
THINKING = ("qwen3_5_think", "qwen3_6", "qwen3_8")
NAMES = (*THINKING, "qwen3_5_nothink", "qwen3_instruct_2507")
NO_THINKING = {"enable_thinking": False}


def user(text: str = "1+1?") -> Turn:
    return {"role": "user", "content": text}


def answer(text: str | list[dict[str, str]] | None = "2", **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


def call(**arguments: Any) -> Turn:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


RESULT = {"role": "tool", "content": "2"}
THOUGHT = answer("<think>\nhm\n</think>\n\n2")


@cache
def tokenizer_of(name: str) -> Any:
    return build_tokenizer(template=name, is_qwen3_5=True)


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(request.param)


@pytest.fixture(params=THINKING)
def thinking(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(request.param)


def text_of(tokenizer: Any, messages: list[Turn], **kwargs: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)).removesuffix("\n")


def ids_of(tokenizer: Any, messages: list[Turn], **kwargs: Any) -> list[int]:
    prompt = text_of(tokenizer, [user()], add_generation_prompt=True)
    text = text_of(tokenizer, messages, **kwargs)
    parts = re.split(r"(?<=<\|im_start\|>assistant\n<think>\n)", text) if prompt.endswith("<think>") else [text]
    return [token for part in parts if part for token in tokenizer(part, add_special_tokens=False)["input_ids"]]


def sft(tokenizer: Any, row: Turn, **options: Any) -> Any:
    (one,), _ = tokenize_sft(as_rows([row]), tokenizer, SFTConfig(max_length=None, **options))
    return one


def learned(tokenizer: Any, row: Any) -> str:
    return str(tokenizer.decode([token for token, is_in in zip(row.token_ids, row.loss_mask, strict=True) if is_in]))


# Thoughts


def test_a_turn_with_thoughts_and_a_tool_call_has_the_tokens_of_the_template(thinking: Any) -> None:
    forms = [
        answer("", reasoning_content="use add"),
        answer("<think>\nuse add\n</think>\n\n"),
        answer("Sure.", reasoning_content="use add"),
    ]
    for form in forms:
        for calls in ([call(a=1)], [call(a=1), call(a=2)]):
            turn = form | {"tool_calls": calls}
            messages = [user(), turn, RESULT, answer("It is 2.", reasoning_content="got 2")]
            row = sft(thinking, {"messages": messages})
            meant = turn | {"content": form["content"].partition("</think>")[2].strip() or form["content"]}
            if "</think>" in form["content"]:
                meant |= {"content": "", "reasoning_content": "use add"}
            assert row.token_ids == ids_of(thinking, [user(), meant, *messages[2:]])
            said = learned(thinking, row)
            assert said.startswith("use add\n</think>\n\n" + ("Sure.\n\n" if form["content"] == "Sure." else ""))
            assert "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>" in said
            assert said.endswith("<|im_end|>got 2\n</think>\n\nIt is 2.<|im_end|>")
            # As prompt and completion, the same text is learned, whatever follows the tool call.
            parted = sft(thinking, {"prompt": messages[:1], "completion": messages[1:]})
            assert (parted.token_ids, parted.loss_mask) == (row.token_ids, row.loss_mask)


@pytest.mark.fault("thoughts in think tags, for a template that reads only reasoning_content", "moved there, and said")
def test_thoughts_in_tags_are_moved_to_the_key_that_the_template_reads() -> None:
    tokenizer = tokenizer_of("qwen3_8")
    turns = [user(), THOUGHT, user("sure?"), answer("Yes. <think>\nhm\n</think>\n\n2")]
    rows = [{"messages": turns}, {"prompt": turns[:3], "completion": turns[3:]}]
    sequences, report = tokenize_sft(rows, tokenizer, SFTConfig(max_length=None))
    assert [learned(tokenizer, row) for row in sequences] == ["hm\n</think>\n\n2<|im_end|>" * n for n in (2, 1)]
    beside, moved = report.warnings
    assert "text before <think>" in beside
    assert "the chat template reads thoughts only from reasoning_content" in moved
    # A prompt stays as serving sends it: its tags follow an empty think block.
    prompt = sequences[1].token_ids[: sequences[1].loss_mask.index(True)]
    assert prompt == tokenizer.apply_chat_template(turns[:3], add_generation_prompt=True, return_dict=False)
    assert "</think>\n\n<think>\nhm" in tokenizer.decode(prompt)
    for name in ("qwen3_5_think", "qwen3_6", "qwen3_instruct_2507"):
        row = {"prompt": turns[:1], "completion": [THOUGHT]}
        assert tokenize_sft([row], tokenizer_of(name), SFTConfig(max_length=None))[1].warnings == []


def test_a_reward_model_reads_thoughts_from_the_key_of_its_template() -> None:
    tokenizer = tokenizer_of("qwen3_8")
    expected = text_of(tokenizer, [user(), answer("2", reasoning_content="hm")]) + "\n"
    pair = {"prompt": [user()], "chosen": [THOUGHT], "rejected": [answer("3")]}
    (row,), report = tokenize_reward_rows([pair], tokenizer, RewardConfig(max_length=None))
    assert tokenizer.decode(row.prompt_ids + row.chosen.token_ids) == expected
    assert any("reads thoughts only from reasoning_content" in line for line in report.warnings)
    for sampled in ("hm\n</think>\n\n2", THOUGHT["content"]):
        segments = reward_model_segments(tokenizer, [user()], sampled, is_sampled=True)
        assert "".join(segment.text for segment in segments) == expected


@pytest.mark.parametrize("name", ["qwen3", *NAMES[:-1]])
def test_thoughts_in_a_tool_loop_are_refused_if_thinking_is_disabled(name: str) -> None:
    tokenizer = tokenizer_of(name)
    options = {"chat_template_kwargs": NO_THINKING}
    loop = [user(), answer("", reasoning_content="hm", tool_calls=[call(a=1)]), RESULT, answer()]
    for row in ({"messages": loop}, {"prompt": [user()], "completion": loop[1:]}):
        with pytest.raises(DataError, match=r"row 0: the answer has thoughts \('hm'\).* set enable_thinking: true"):
            sft(tokenizer, row, **options)
    with pytest.raises(DataError, match="row 0: the answer has thoughts"):
        tokenize_preferences(
            [{"prompt": loop[:3], "chosen": [THOUGHT], "rejected": [answer()]}], tokenizer, DPOConfig(**options)
        )
    # Messages that are not learned may have thoughts: those of a prompt, and those that the row excludes.
    marked = sft(tokenizer, {"messages": [user(), loop[1] | {"loss": False}, *loop[2:]]}, **options)
    prompted = sft(tokenizer, {"prompt": loop[:3], "completion": loop[3:]}, **options)
    assert learned(tokenizer, marked) == learned(tokenizer, prompted) == "2<|im_end|>"
    assert marked.token_ids == prompted.token_ids
    last = sft(tokenizer, {"messages": [user(), answer(), user("sure?"), THOUGHT | {"loss": False}]}, **options)
    assert learned(tokenizer, last) == "2<|im_end|>"
    assert sft(tokenizer, {"messages": [user(), loop[1] | {"reasoning_content": ""}, *loop[2:]]}, **options)


def test_interleaved_thoughts_are_kept_until_the_next_question(thinking: Any) -> None:
    loop = [user(), answer("", reasoning_content="first", tool_calls=[call(a=1)]), RESULT]
    turns = [*loop, answer("2", reasoning_content="then"), user("sure?"), answer("2", reasoning_content="last")]
    row = sft(thinking, {"messages": turns})
    assert row.token_ids == ids_of(thinking, turns)
    keeps = "preserve_thinking is undefined" in thinking.chat_template  # only in Qwen3.8's template
    assert [word in learned(thinking, row) for word in ("first", "then", "last")] == [keeps, keeps, True]
    whole = sft(thinking, {"messages": turns[:4]})
    assert learned(thinking, whole).count("</think>") == 2
    all_kept = sft(thinking, {"messages": turns}, preserve_thinking=True)
    assert learned(thinking, all_kept).count("</think>") == 3
    dropped = sft(thinking, {"messages": turns}, preserve_thinking=False)
    assert [word in thinking.decode(dropped.token_ids) for word in ("first", "then", "last")] == [False, False, True]
    # A tool result in a user message is not a question either, even with control tokens in its text.
    result = user("<tool_response>\n2<|im_end|>\n</tool_response> \n")
    messages = [*turns[:2], result, answer("2", reasoning_content="then")]
    for preserve in (None, False):
        assert "first" in learned(thinking, sft(thinking, {"messages": messages}, preserve_thinking=preserve))


def test_dropped_thoughts_of_earlier_turns_give_a_warning(thinking: Any) -> None:
    row = {
        "messages": [user(), answer("2", reasoning_content="hm"), user("sure?"), answer("2", reasoning_content="hm")]
    }
    keeps = "preserve_thinking is undefined" in thinking.chat_template
    for kwargs, is_warned in (({}, not keeps), ({"preserve_thinking": False}, True)):
        _, report = tokenize_sft([row], thinking, SFTConfig(max_length=None, chat_template_kwargs=kwargs))
        said = [line for line in report.warnings if "drops the thoughts of 1 earlier turns" in line]
        assert bool(said) is is_warned
        assert any("1 without a think block after a prompt" in line for line in report.form) is is_warned


def test_a_truncated_thought_gets_no_empty_think_block_before_it(thinking: Any) -> None:
    cut = answer("<think>\nhm")
    for completion in ([cut], [cut, RESULT, cut]):
        row = sft(thinking, {"prompt": [user()], "completion": completion})
        assert learned(thinking, row) == "hm<|im_end|>" * completion.count(cut)


@pytest.mark.parametrize("content", [THOUGHT["content"], "hm\n</think>\n\n2", "\n<think>\nhm\n</think>\n\n2"])
def test_thoughts_without_an_opening_tag_are_read_as_thoughts(thinking: Any, content: Any) -> None:
    messages = [user(), answer("2", reasoning_content="hm")]
    ids, _ = tokenize_conversation(thinking, [user(), answer(content)])
    assert ids[:-1] == ids_of(thinking, messages)
    with pytest.raises(DataError, match="the answer has thoughts"):
        tokenize_conversation(thinking, [user(), answer(content)], chat_template_kwargs=NO_THINKING)


# Prompts


@pytest.mark.parametrize("kwargs", [{}, NO_THINKING, {"reasoning_effort": "low"}], ids=str)
def test_history_in_a_prompt_is_rendered_as_in_serving(tokenizer: Any, kwargs: Any) -> None:
    for said in ([THOUGHT], [answer()], [answer("", reasoning_content="hm", tool_calls=[call(a=1)]), RESULT, answer()]):
        prompt = [user(), *said, user("and 2+2?")]
        expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **kwargs)
        (sampled,), _ = tokenize_prompts(
            as_rows([{"prompt": prompt}]), tokenizer, max_prompt_length=None, chat_template_kwargs=kwargs
        )
        pair = {"prompt": prompt, "chosen": [answer("4")], "rejected": [answer("5")]}
        (both,), _ = tokenize_preferences(as_rows([pair]), tokenizer, DPOConfig(chat_template_kwargs=kwargs))
        one = sft(tokenizer, {"prompt": prompt, "completion": [answer("4")]}, chat_template_kwargs=kwargs)
        assert sampled.token_ids == both.prompt_ids == one.token_ids[: one.loss_mask.index(True)] == expected


def test_a_system_column_is_the_first_message_in_every_format(tokenizer: Any) -> None:
    column = {"system": "You are terse."}
    turns, shared = [user(), answer()], [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    system = {"role": "system", "content": "You are terse."}
    prompt = text_of(tokenizer, [system, user()], add_generation_prompt=True).rstrip()
    for row in (
        {"messages": turns},
        {"conversations": shared},
        {"instruction": "1+1?", "output": "2"},
        {"prompt": [user()], "completion": [answer()]},
    ):
        assert tokenizer.decode(sft(tokenizer, column | row).token_ids).startswith(prompt)
    pair = column | {"chosen": turns, "rejected": [user(), answer("3")]}
    (both,), _ = tokenize_preferences(as_rows([pair]), tokenizer, DPOConfig())
    (sampled,), _ = tokenize_prompts(as_rows([column | {"prompt": [user()]}]), tokenizer, max_prompt_length=None)
    assert tokenizer.decode(both.prompt_ids).rstrip() == tokenizer.decode(sampled.token_ids).rstrip() == prompt


def test_reasoning_effort_is_passed_to_the_template_and_invalid_values_are_refused() -> None:
    tokenizer = tokenizer_of("qwen3_8")
    empty = [{"role": "system", "content": ""}, user()]
    for kwargs in ({"reasoning_effort": "medium"}, NO_THINKING):
        row = sft(tokenizer, {"messages": [*empty, answer()]}, chat_template_kwargs=kwargs)
        assert tokenizer.decode(row.token_ids).startswith("<|im_start|>user\n")
    row = sft(tokenizer, {"messages": [*empty, answer()]})
    assert tokenizer.decode(row.token_ids).startswith("<|im_start|>system\nReasoning effort is set to xhigh.")
    with pytest.raises(DataError, match=r"Unexpected reasoning effort high\. Supported types are xhigh"):
        sft(tokenizer, {"messages": [user(), answer()]}, chat_template_kwargs={"reasoning_effort": "high"})


def test_unread_template_arguments_are_reported() -> None:
    kwargs = {"reasoning_effort": "low", "enable_thinking": True}
    row = {"messages": [user(), answer()]}
    for name, unread in (("qwen3_8", ""), ("qwen3_6", "reasoning_effort"), ("qwen2_5", ", ".join(kwargs))):
        tokenizer = tokenizer_of(name)
        _, report = tokenize_sft([row], tokenizer, SFTConfig(max_length=None, chat_template_kwargs=kwargs))
        _, other = tokenize_prompts([row], tokenizer, max_prompt_length=None, chat_template_kwargs=kwargs)
        line = [f"chat_template_kwargs that the chat template does not read: {unread}"] if unread else []
        assert report.warnings == other.warnings == line


@pytest.mark.fault("a conversation that the chat template refuses", "refused in one line, with row, roles and reason")
@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([{"role": "system", "content": "s"}], "No user query found"),
        ([user("<tool_response>\n2\n</tool_response>")], "No user query found"),
        ([user(), {"role": "critic", "content": "no"}], "Unexpected message role"),
        ([user(), answer(), {"role": "system", "content": "s"}], "System message must be at the beginning"),
    ],
)
def test_template_errors_are_raised_with_row_and_reason(
    thinking: Any, prompt: str | list[Message], reason: str
) -> None:
    pair = {"prompt": prompt, "chosen": [answer()], "rejected": [answer("3")]}
    for refuse in (
        lambda: sft(thinking, {"messages": [*prompt, answer()]}),
        lambda: tokenize_preferences([pair], thinking, DPOConfig()),
        lambda: tokenize_reward_rows([pair], thinking, RewardConfig()),
        lambda: tokenize_prompts([{"prompt": prompt}], thinking, max_prompt_length=None),
    ):
        with pytest.raises(DataError, match=rf"row 0: the chat template refuses this conversation .*{reason}") as error:
            refuse()
        assert "\n" not in str(error.value)


# Rows of every form


def test_openai_messages_in_a_conversations_column_are_read_like_messages(tokenizer: Any) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    opens = "enable_thinking" in tokenizer.chat_template
    options = {"chat_template_kwargs": {"enable_thinking": True}}
    for turns in (
        [user(), answer("", tool_calls=calls), RESULT, answer()],
        [user(), answer(None, tool_calls=calls), RESULT, answer()],
        [user(), answer(reasoning_content="easy")],
        [user(), answer([{"type": "text", "text": "2"}])],
    ):
        given, own = (sft(tokenizer, {column: turns}, **options) for column in ("conversations", "messages"))
        assert (given.token_ids, given.loss_mask) == (own.token_ids, own.loss_mask)
    for key in ("reasoning", "thinking"):
        said = learned(tokenizer, sft(tokenizer, {"messages": [user(), answer(**{key: "easy"})]}, **options))
        assert said == ("" if opens else "<think>\n") + "easy\n</think>\n\n2<|im_end|>"


@pytest.mark.parametrize("key", ["weight", "loss", "train", "training"])
def test_messages_excluded_from_the_loss_stay_in_the_context(tokenizer: Any, key: str) -> None:
    turns = [user(), answer("WRONG", **{key: 0}), user("sure?"), answer("2", **{key: 1})]
    whole = sft(tokenizer, {"messages": turns})
    assert whole.token_ids == ids_of(tokenizer, [{k: v for k, v in turn.items() if k != key} for turn in turns])
    assert "WRONG" not in learned(tokenizer, whole)
    assert learned(tokenizer, whole).endswith("2<|im_end|>")


def test_pandas_rows_and_messages_as_json_text_are_read(tokenizer: Any) -> None:
    table = pandas.read_csv(io.StringIO("instruction,input,output\nAdd,1 and 1,2\nSay hi,,hi\n"))
    rows, _ = tokenize_sft(as_rows(table.to_dict("records")), tokenizer, SFTConfig())
    expected = [ids_of(tokenizer, [user(q), answer(a)]) for q, a in (("Add\n1 and 1", "2"), ("Say hi", "hi"))]
    assert [row.token_ids for row in rows] == expected
    prompt, completion = json.dumps([user()]), json.dumps([answer()])
    assert sft(tokenizer, {"prompt": prompt, "completion": completion}).token_ids == ids_of(
        tokenizer, [user(), answer()]
    )


def test_added_special_tokens_are_learned_and_passed_to_rewards(thinking: Any) -> None:
    tokenizer = build_tokenizer(template="qwen3_5_think", is_qwen3_5=True)
    tokenizer.chat_template = thinking.chat_template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    text = "<answer>2</answer>"
    row = sft(tokenizer, {"messages": [user(), answer(text, reasoning_content="hm")]})
    sampled = [token for token, is_in in zip(row.token_ids, row.loss_mask, strict=True) if is_in]
    assert tokenizer.decode(sampled) == f"hm\n</think>\n\n{text}<|im_end|>"
    assert set(map(tokenizer.convert_tokens_to_ids, ["<answer>", "</answer>"])) <= set(sampled)
    engine = TransformersEngine(None, tokenizer, max_model_length=99, max_num_seqs=1)
    (one,) = engine._completions([sampled], [[0.0] * len(sampled)], {tokenizer.eos_token_id})
    assert one.text == f"hm\n</think>\n\n{text}"


# Tools


def test_tool_arguments_of_every_type_are_rendered_as_the_template_does(thinking: Any) -> None:
    arguments = {"s": "a\nb", "n": 1.5, "yes": True, "none": None, "list": [1, None], "object": {"k": "<|im_end|>"}}
    own = [user(), answer("", tool_calls=[call(**arguments)]), RESULT, answer(reasoning_content="hm")]
    text = [user(), answer("", tool_calls=[call()]), *own[2:]]
    text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(arguments)
    for messages in (own, text):
        row = sft(thinking, {"messages": messages})
        assert thinking.decode(row.token_ids) == text_of(thinking, own)
    python = "None" in thinking.decode(row.token_ids)
    assert python is ("args_value is string else args_value | tojson" not in thinking.chat_template)
    assert (
        row.token_ids.count(thinking.convert_tokens_to_ids("<|im_end|>"))
        == thinking.decode(row.token_ids).count("<|im_end|>\n") + 1
    )


def test_calls_and_tools_keep_only_their_own_arguments_in_every_table_format(tokenizer: Any, tmp_path: Path) -> None:
    def tool(name: str, **properties: Any) -> Turn:
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}

    nullable = {"type": ["string", "null"], "default": None, "enum": ["x", None]}
    given: list[tuple[dict[str, Any], Turn]] = [
        ({"a": 1}, tool("f", a={"type": "string"})),
        ({"b": "x"}, tool("g", b={"type": "integer"})),
    ]
    for cases in (given, [({"a": 1}, tool("f", a=nullable))]):
        rows = [
            {"messages": [user(), answer("", tool_calls=[call(**values)]), RESULT, answer()], "tools": [one]}
            for values, one in cases
        ]
        expected = [ids_of(tokenizer, row["messages"], tools=row["tools"]) for row in rows]
        path = Path(tmp_path / "rows.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read = load_rows(SourceConfig(path=str(path)), seed=0)
        for form in (read, as_rows(rows), as_rows(Dataset.from_list(rows))):
            sequences, _ = tokenize_sft(form, tokenizer, SFTConfig(max_length=None))
            assert [row.token_ids for row in sequences] == expected


# Rewards


def test_rewards_know_that_the_prompt_opened_a_think_block(thinking: Any) -> None:
    texts = ["1+1\n</think>\n\n\\boxed{2}", "<think>\n1+1\n</think>\n\n\\boxed{2}", "maybe \\boxed{2}, but"]
    for kwargs, expected in (({}, [1.0, 0.0, 0.0]), (NO_THINKING, [0.0, 1.0, 0.0])):
        (prompt,), _ = tokenize_prompts(
            as_rows([{"prompt": [user()]}]), thinking, max_prompt_length=None, chat_template_kwargs=kwargs
        )
        given: dict[str, Any] = {"prompts": [[user()]] * 3, "prompt_opens_reasoning": [prompt.opens_reasoning] * 3}
        assert Format()(texts, **given) == expected
        tags = TagCount(tags=["<think>", "</think>"])(texts, **given)
        assert tags == ([1.0, 0.5, 0.5] if not kwargs else [0.5, 1.0, 0.0])
        graded = Accuracy()(texts, solution=["2"] * 3, **given)
        assert graded == [1.0, graded[1], 0.0 if not kwargs else 1.0]
