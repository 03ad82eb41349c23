"""Test that a whole row equals the rendered template, and that all algorithms and serving use the same prompt tokens."""

from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import DPOConfig, RewardConfig, SFTConfig
from rlqwen.data import (
    tokenize_labelled,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_reward_rows,
    tokenize_sft,
)
from rlqwen.errors import DataError
from rlqwen.models.tiny import build_tokenizer, read_trl_template
from tests.narrowing import instance_of

Turn = dict[str, Any]

TEMPLATES = (
    "qwen3",
    "qwen2_5",
    "qwen3_instruct_2507",
    "opens_think",
    "qwen3_5_think",
    "qwen3_5_nothink",
    "qwen3_6",
    "qwen3_8",
)
OPENING = ("opens_think", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8")
# Like Qwen3-Thinking's template: the generation prompt opens a think block, and every turn has exactly one.
OPENS_THINK = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- set thoughts = m.reasoning_content if m.reasoning_content is string else '' %}{%- set answer = m.content %}
{%- if '</think>' in answer %}
{%- set thoughts = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + answer }}
{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + call.function.name + '</tool_call>' }}{%- endfor %}
{%- else %}{{- m.content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
THINKS = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}
PLAIN = {"role": "assistant", "content": "2"}


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def called(**turn: Any) -> list[Turn]:
    """Return an assistant message with a tool call, and the tool's result."""
    return [{"role": "assistant", "content": "", **turn}, {"role": "tool", "content": "2"}]


PROMPTS: dict[str, list[Turn]] = {
    "a question": [user("1+1?")],
    "a system turn": [{"role": "system", "content": "Be brief."}, user("1+1?")],
    "an earlier answer": [user("1+1?"), PLAIN, user("sure?")],
    "earlier thoughts": [user("1+1?"), THINKS, user("sure?"), THINKS, user("really?")],
    "thoughts in a field": [user("1+1?"), PLAIN | {"reasoning_content": "hm"}, user("sure?")],
    "a call": [user("1+1?"), *called(tool_calls=[CALL])],
    "a call after thoughts": [user("1+1?"), *called(tool_calls=[CALL], content="<think>\nhm\n</think>\n\n")],
    "calls after thoughts in a field": [user("1+1?"), *called(tool_calls=[CALL, CALL], reasoning_content="hm")],
    "a call after words": [user("1+1?"), *called(tool_calls=[CALL], content="I add.", reasoning_content="hm")],
    "calls of an earlier question": [user("1+1?"), *called(tool_calls=[CALL], content="So."), PLAIN, user("sure?")],
}
ANSWERS: dict[str, Turn] = {
    "plain": PLAIN,
    "thinks": THINKS,
    "thinks in a field": PLAIN | {"reasoning_content": "\nhm\n"},
    "closes only": {"role": "assistant", "content": "hm\n</think>\n\n2"},
    "thinks and calls": {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
    "calls twice": {"role": "assistant", "content": "So.", "tool_calls": [CALL, CALL]},
}


def in_field(turn: Turn) -> Turn:
    """Return the message for a template that reads thoughts only from reasoning_content."""
    before, closed, answer = turn["content"].partition("</think>")
    if turn["role"] != "assistant" or not closed:
        return turn
    return turn | {"content": answer.strip(), "reasoning_content": before.removeprefix("<think>").strip()}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def template_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("templates")
    for name in TEMPLATES:
        (folder / name).write_text(OPENS_THINK if name == "opens_think" else read_trl_template(name))
    return {name: str(folder / name) for name in TEMPLATES}


def served(tokenizer: Any, messages: list[Turn], template: str, **kwargs: Any) -> list[int]:
    """Return the token ids that serving sends for a conversation."""
    ids = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=False, **kwargs
    )
    return list(ids)


def written(tokenizer: Any, messages: list[Turn], template: str, **kwargs: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["default", "no thinking"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_algorithm_uses_the_prompt_that_serving_sends(
    tokenizer: Any, template_files: dict[str, str], name: str, kwargs: dict[str, Any]
) -> None:
    template = Path(template_files[name]).read_text()
    options = {"chat_template_path": template_files[name], "max_length": None}
    sampled: dict[str, Any] = {"max_prompt_length": None, "chat_template": template, "chat_template_kwargs": kwargs}
    judge = build_tokenizer()
    judge.chat_template = template
    for prompt in PROMPTS.values():
        expected = served(tokenizer, prompt, template, **kwargs)
        pair = {"prompt": prompt, "chosen": [PLAIN], "rejected": [PLAIN | {"content": "3"}]}
        labelled = {"prompt": prompt, "completion": [PLAIN], "label": True}
        given = options | {"chat_template_kwargs": kwargs}
        (sft,), _ = tokenize_sft([{"prompt": prompt, "completion": [PLAIN]}], tokenizer, SFTConfig(**given))
        (dpo,), _ = tokenize_preferences([pair], tokenizer, DPOConfig(**given))
        (kto,), _ = tokenize_labelled([labelled], tokenizer, DPOConfig(**given))
        (grpo,), _ = tokenize_prompts([{"prompt": prompt}], tokenizer, **sampled)
        assert sft.token_ids[: sft.loss_mask.index(True)] == expected
        assert dpo.prompt_ids == kto.prompt_ids == grpo.token_ids == expected
        if not kwargs:  # a reward model's conversations are rendered without chat_template_kwargs
            (reward,), _ = tokenize_reward_rows([pair], judge, RewardConfig(max_length=None))
            whole = tokenizer.decode(reward.prompt_ids + reward.chosen.token_ids)
            assert whole == written(tokenizer, [*prompt, PLAIN], template)
            assert whole.startswith(tokenizer.decode(expected))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_whole_row_equals_the_rendered_template(tokenizer: Any, template_files: dict[str, str], name: str) -> None:
    template = Path(template_files[name]).read_text()
    kwargs = {"enable_thinking": True} if name == "qwen3_5_nothink" else {}
    config = SFTConfig(chat_template_path=template_files[name], max_length=None, chat_template_kwargs=kwargs)
    knows_fields = name not in ("qwen2_5", "qwen3_instruct_2507")
    rows = [(prompt, answer) for prompt in PROMPTS.values() for answer in ANSWERS.values()]
    if not knows_fields:
        rows = [row for row in rows if not any("reasoning_content" in turn for turn in [*row[0], row[1]])]
    for form in ("messages", "completion"):
        data = [
            {"messages": [*prompt, answer]} if form == "messages" else {"prompt": prompt, "completion": [answer]}
            for prompt, answer in rows
        ]
        out, _ = tokenize_sft(data, tokenizer, config)
        for (prompt, answer), row in zip(rows, out, strict=True):
            if name == "qwen3_8":  # thoughts in tags of a prompt stay in the content; those of learned turns are moved
                prompt = [in_field(turn) for turn in prompt] if form == "messages" else prompt
                answer = in_field(answer)
            text = written(tokenizer, [*prompt, answer], template, **kwargs)
            assert tokenizer.decode(row.token_ids) == text.removesuffix("\n")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            # They differ only if a turn without thoughts closes the think block that its prompt opened.
            is_parted = name in OPENING and "\n<think>\n\n</think>" in text
            assert row.token_ids == ids[:-1] or is_parted


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_learned_thoughts_reach_a_template_without_reasoning_content(
    tokenizer: Any, template_files: dict[str, str], name: str
) -> None:
    config = SFTConfig(chat_template_path=template_files[name])
    for field in ("reasoning_content", "reasoning", "thinking"):
        turn = {"role": "assistant", "content": "2", field: "hm"}
        for row in ({"messages": [user("q"), turn]}, {"prompt": [user("q")], "completion": [turn]}):
            (out,), _ = tokenize_sft([row], tokenizer, config)
            assert tokenizer.decode(out.token_ids).endswith("assistant\n<think>\nhm\n</think>\n\n2<|im_end|>")
        judge = build_tokenizer()
        judge.chat_template = Path(template_files[name]).read_text()
        (pair,), _ = tokenize_reward_rows(
            [{"prompt": [user("q")], "chosen": [turn], "rejected": [PLAIN]}], judge, RewardConfig()
        )
        assert tokenizer.decode(pair.chosen.token_ids) == "<think>\nhm\n</think>\n\n2<|im_end|>\n"


def test_thoughts_that_the_template_drops_follow_the_think_block_it_opens(tokenizer: Any, tmp_path: Path) -> None:
    # Like DeepSeek-R1-Distill-Qwen's template: only answers are written, and the generation prompt opens a think block.
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    for answer, learned in ((THINKS, "hm\n</think>\n\n2"), (PLAIN, "\n</think>\n\n2")):
        row = {"prompt": [user("q"), THINKS, user("r")], "completion": [answer]}
        (out,), _ = tokenize_sft([row], tokenizer, SFTConfig(chat_template_path=str(path)))
        assert tokenizer.decode(out.token_ids).endswith(
            f"r<|im_end|><|im_start|>assistant\n<think>\n{learned}<|im_end|>"
        )
        assert tokenizer.decode(out.token_ids).count("hm") == learned.count("hm")


def test_a_completion_of_several_turns_begins_after_the_generation_prompt(tokenizer: Any) -> None:
    completion = [THINKS, user("sure?"), PLAIN]
    (row,), _ = tokenize_sft([{"prompt": [user("q")], "completion": completion}], tokenizer, SFTConfig())
    learned = tokenizer.decode([token for token, is_in in zip(row.token_ids, row.loss_mask, strict=True) if is_in])
    assert learned == f"{THINKS['content']}<|im_end|><think>\n\n</think>\n\n2<|im_end|>"


def test_preserve_thinking_keeps_or_removes_earlier_thoughts(tokenizer: Any, template_files: dict[str, str]) -> None:
    turns = [user("q"), THINKS, user("r"), PLAIN, user("s"), THINKS]
    tool_loop = [user("q"), *called(tool_calls=[CALL], content=THINKS["content"]), THINKS]

    def learned(messages: list[Turn], name: str, preserve: bool | None) -> str:
        config = SFTConfig(chat_template_path=template_files[name], preserve_thinking=preserve)
        (row,), _ = tokenize_sft([{"messages": messages}], tokenizer, config)
        return str(tokenizer.decode([t for t, is_in in zip(row.token_ids, row.loss_mask, strict=True) if is_in]))

    thinks, plain, block = f"{THINKS['content']}<|im_end|>", "2<|im_end|>", "<think>\n\n</think>\n\n"
    assert learned(turns, "qwen3", None) == learned(turns, "qwen3", False) == plain + plain + thinks
    assert learned(turns, "qwen3", True) == thinks + block + plain + thinks
    assert learned(turns, "qwen2_5", None) == learned(turns, "qwen2_5", True) == thinks + plain + thinks
    assert learned(turns, "qwen2_5", False) == plain + plain + thinks
    assert learned(turns, "qwen3_6", True).count("hm") == 2
    # Thoughts between a question and its answer are not earlier thoughts.
    assert learned(tool_loop, "qwen2_5", False).count("hm") == learned(tool_loop, "qwen3", None).count("hm") == 2


def test_truncated_thoughts_get_no_think_block_before_them(tokenizer: Any) -> None:
    cut = {"role": "assistant", "content": "<think>\nhm"}
    row = {"prompt": [user("q")], "chosen": [PLAIN], "rejected": [cut]}
    (pair,), _ = tokenize_preferences([row], tokenizer, DPOConfig())
    assert tokenizer.decode(pair.rejected.token_ids) == "<think>\nhm<|im_end|>"


def test_an_answer_with_thoughts_is_refused_if_the_prompt_disables_thinking(tokenizer: Any) -> None:
    config = SFTConfig(chat_template_kwargs={"enable_thinking": False})
    for answer in (ANSWERS["thinks"], ANSWERS["thinks in a field"], ANSWERS["closes only"]):
        with pytest.raises(DataError, match="set enable_thinking: true"):
            tokenize_sft([{"prompt": [user("q")], "completion": [answer]}], tokenizer, config)


def test_added_special_tokens_act_in_messages_and_control_tokens_do_not() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    marks = ("<answer>", "</answer>", "<|im_end|>")
    first, last, end = (instance_of(int, tokenizer.convert_tokens_to_ids(mark)) for mark in marks)
    text = "<answer>2</answer><|im_end|>"
    rows: list[dict[str, Any]] = [
        {"messages": [user(text), {"role": "assistant", "content": text}]},
        {"prompt": [user(text)], "completion": text},
    ]
    for row in rows:
        (out,), _ = tokenize_sft([row], tokenizer, SFTConfig())
        assert [out.token_ids.count(token) for token in (first, last, end)] == [2, 2, 2]
        assert tokenizer.decode(out.token_ids).count(text) == 2
    pair = {"prompt": [user("q")], "chosen": [{"role": "assistant", "content": text}], "rejected": [PLAIN]}
    (scored,), _ = tokenize_reward_rows([pair], tokenizer, RewardConfig())
    ids = scored.prompt_ids + scored.chosen.token_ids
    assert [ids.count(token) for token in (first, last, end)] == [1, 1, 2]


# The report says what the rows train


def report(tokenizer: Any, row: dict[str, Any], **options: Any) -> Any:
    return tokenize_sft([row], tokenizer, SFTConfig(**options))[1]


def test_the_report_says_which_thinking_mode_rows_without_thoughts_train(tokenizer: Any) -> None:
    row = {"prompt": [user("q")], "completion": [PLAIN]}
    (line, other) = report(tokenizer, row).form
    assert line.startswith("1 of 1 sampled answers have no thoughts")
    assert "with an empty think block, which is learned because the prompt asks for thoughts" in line
    assert other.startswith("unlike TRL: the line break after")
    (line, _) = report(tokenizer, row, chat_template_kwargs={"enable_thinking": False}).form
    assert "after a prompt that ends in an empty think block" in line
    several = {"messages": [user("q"), PLAIN, user("r"), THINKS]}
    (line, other) = report(tokenizer, several).form
    assert "1 of 2 sampled answers" in line
    assert "without a think block" in line
    assert "only assistant turns of messages are learned (assistant_only_loss: false learns all)" in other
    assert report(tokenizer, several, assistant_only_loss=False).form == [line]
    assert len(report(tokenizer, {"messages": [user("q"), THINKS]}).form) == 1


def test_dropped_thoughts_of_learned_turns_give_a_warning(tokenizer: Any) -> None:
    row = {"messages": [user("q"), THINKS, user("r"), THINKS]}
    (warning,) = report(tokenizer, row).warnings
    assert "drops the thoughts of 1 earlier turns" in warning
    assert report(tokenizer, row, preserve_thinking=True).warnings == []
    unlearned = {"messages": [user("q"), THINKS | {"loss": False}, user("r"), THINKS]}
    assert report(tokenizer, unlearned).warnings == []


def test_plain_text_without_the_chat_template_gives_a_warning(tokenizer: Any) -> None:
    text = {"prompt": "q", "completion": "a"}
    for found in (
        report(tokenizer, text),
        report(tokenizer, {"text": "q"}),
        tokenize_preferences([text | {"chosen": "a", "rejected": "b"}], tokenizer, DPOConfig())[1],
        tokenize_reward_rows([text | {"chosen": "a", "rejected": "b"}], tokenizer, RewardConfig())[1],
        tokenize_prompts([text], tokenizer, max_prompt_length=None)[1],
    ):
        assert any("all sampled rows are plain text: they are rendered WITHOUT" in line for line in found.warnings)
