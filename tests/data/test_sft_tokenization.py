"""Test tokenization of SFT rows and prompts: what is learned, truncated, dropped and counted."""

from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import SFTConfig, SourceConfig
from rlqwen.data import load_rows, tokenize_prompts, tokenize_sft
from rlqwen.data.cleaning.texts import Row
from rlqwen.errors import ConfigError, DataError, ModelError
from rlqwen.models.tiny import build_tokenizer, read_trl_template

SAMPLES = Path(__file__).parents[1] / "samples"
USER = {"role": "user", "content": "12 + 34 = ?"}
ANSWER = {"role": "assistant", "content": "\\boxed{46}"}
CHAT = {"messages": [USER, ANSWER]}
BLOCK = "<think>\n\n</think>\n\n"
HEAD = "<|im_start|>user\n12 + 34 = ?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def sft(tokenizer: Any, row: dict[str, Any], **options: Any) -> tuple[str, str]:
    """Return (whole text, text in the loss) of one row."""
    (out,), _ = tokenize_sft([row], tokenizer, SFTConfig(**options))
    learned = [token for token, in_loss in zip(out.token_ids, out.loss_mask, strict=True) if in_loss]
    return tokenizer.decode(out.token_ids), tokenizer.decode(learned)


def test_conversations_learn_only_the_answer_by_default(tokenizer: Any) -> None:
    assert sft(tokenizer, CHAT) == (HEAD + BLOCK + "\\boxed{46}<|im_end|>", BLOCK + "\\boxed{46}<|im_end|>")
    whole = HEAD + BLOCK + "\\boxed{46}<|im_end|>\n"
    assert sft(tokenizer, CHAT, assistant_only_loss=False) == (whole, whole.removeprefix("<|im_start|>"))


def test_text_prompts_and_completions_are_not_changed_and_end_in_eos(tokenizer: Any) -> None:
    row = {"prompt": "<|im_start|>1 +", "completion": " 1 = 2"}
    assert sft(tokenizer, row) == ("<|im_start|>1 + 1 = 2<|im_end|>", " 1 = 2<|im_end|>")
    assert sft(tokenizer, row, completion_only_loss=False)[1] == "1 + 1 = 2<|im_end|>"
    assert sft(tokenizer, row, eos_token="<|endoftext|>")[1] == " 1 = 2<|endoftext|>"
    assert sft(tokenizer, row | {"completion": "2<|im_end|>"})[1] == "2<|im_end|>"


def test_prompt_and_completion_are_tokenized_separately_as_in_generation(tokenizer: Any) -> None:
    (out,), _ = tokenize_sft([{"prompt": "1\n", "completion": "\n2"}], tokenizer, SFTConfig())
    assert tokenizer.convert_ids_to_tokens(out.token_ids) == ["1", "Ċ", "Ċ", "2", "<|im_end|>"]
    assert tokenizer.tokenize("1\n\n2") == ["1", "ĊĊ", "2"]


def test_completions_of_messages_learn_only_their_own_turns(tokenizer: Any) -> None:
    earlier = [USER, {"role": "assistant", "content": "7"}]
    row = {"prompt": [*earlier, USER], "completion": [ANSWER]}
    assert sft(tokenizer, row)[1] == BLOCK + "\\boxed{46}<|im_end|>"
    assert sft(tokenizer, row | {"completion": "\\boxed{46}"}) == sft(tokenizer, row)
    assert (
        sft(tokenizer, row, completion_only_loss=False, assistant_only_loss=True)[1]
        == "7<|im_end|>" + BLOCK + "\\boxed{46}<|im_end|>"
    )
    whole, learned = sft(tokenizer, row, completion_only_loss=False)
    assert learned == whole.removeprefix("<|im_start|>")


def test_a_completion_that_begins_with_the_user_is_learned_from_its_first_assistant_turn(tokenizer: Any) -> None:
    row = {"prompt": [USER, {"role": "assistant", "content": "7"}], "completion": [USER, ANSWER]}
    text, learned = sft(tokenizer, row)
    assert text == f"{HEAD}7<|im_end|>\n{HEAD}{BLOCK}\\boxed{{46}}<|im_end|>"
    assert learned == BLOCK + "\\boxed{46}<|im_end|>"


def test_plain_text_of_the_configured_column_is_learned_completely(tokenizer: Any) -> None:
    assert sft(tokenizer, {"text": "1 + 1"})[1] == " + 1<|im_end|>"
    assert sft(tokenizer, {"body": "1 + 1"}, dataset_text_field="body")[0] == "1 + 1<|im_end|>"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "1"}, {"assistant_only_loss": True}, "assistant_only_loss is set, but the row is plain text"),
        ({"text": "1"}, {"completion_only_loss": True}, "completion_only_loss is set, but the row is plain text"),
        (CHAT, {"completion_only_loss": True}, "completion_only_loss is set, but the row is a whole conversation"),
        ({"prompt": "1", "completion": "2"}, {"assistant_only_loss": True}, "assistant_only_loss is set"),
        ({"prompt": "1", "solution": "2"}, {}, r"row 0: nothing to learn; .*map one with columns: \{completion"),
        ({"question": "1"}, {}, r"row 0: nothing to learn; .*This one has question: map them"),
        (
            {"question": "1", "answer": "2"},
            {},
            r"columns: \{instruction: question, output: answer\} \(--column instruction=",
        ),
        (
            {"prompt": "1", "response": "2"},
            {},
            r"\{completion: response\} .*columns: \{instruction: prompt, output: response",
        ),
        (
            {"messages": [USER]},
            {},
            r"none of 1 rows has anything to learn from, so the loss would be 0: .*no assistant",
        ),
        (CHAT, {"max_length": 10}, r"would be 0: 1 have no token in the loss: .*max_length=10"),
        (CHAT, {"max_length": 10, "truncation_mode": "drop"}, "1 are longer than max_length=10 and were dropped"),
    ],
)
def test_rows_with_nothing_to_learn_are_refused(
    tokenizer: Any, row: Row, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_sft([row], tokenizer, SFTConfig(**options))


def test_no_rows_and_unknown_eos_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the dataset is empty"):
        tokenize_sft([], tokenizer, SFTConfig())
    with pytest.raises(ConfigError, match="'<eos>' is not in the tokenizer's vocabulary"):
        tokenize_sft([CHAT], tokenizer, SFTConfig(eos_token="<eos>"))


def test_a_missing_template_raises_an_error_and_can_be_configured(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="set chat_template_path"):
        tokenize_sft([CHAT], tokenizer, SFTConfig())
    assert tokenize_sft([{"text": "1 + 1"}], tokenizer, SFTConfig())[1].num_kept == 1
    path = tmp_path / "template.jinja"
    path.write_text(read_trl_template("qwen3"))
    assert sft(tokenizer, CHAT, chat_template_path=str(path))[0] == HEAD + BLOCK + "\\boxed{46}<|im_end|>"


def test_template_arguments_reach_the_template(tokenizer: Any) -> None:
    text, learned = sft(tokenizer, CHAT, chat_template_kwargs={"enable_thinking": False})
    assert text == HEAD + BLOCK + "\\boxed{46}<|im_end|>"
    assert learned == "\\boxed{46}<|im_end|>"


def test_the_report_counts_truncated_and_dropped_rows(tokenizer: Any) -> None:
    long = {"messages": [USER, {"role": "assistant", "content": "1" * 30}]}
    rows: list[dict[str, Any]] = [CHAT, long, {"messages": [USER]}, CHAT]
    kept, report = tokenize_sft(rows, tokenizer, SFTConfig(max_length=28))
    assert [len(row.token_ids) for row in kept] == [26, 28, 26]
    assert (report.num_rows, report.num_kept, report.num_truncated, report.num_empty_mask) == (4, 3, 1, 1)
    assert (report.num_tokens, report.num_loss_tokens) == (26 + 28 + 26, 10 + 12 + 10)
    assert report.eos_in_loss == pytest.approx(2 / 3)
    assert report.lengths == {"p50": 27, "p90": 52, "p99": 52, "max": 52}
    assert report.end_of_turn == "<|im_end|>"
    assert "3 of 4 rows" in report.summary()
    kept, report = tokenize_sft(rows, tokenizer, SFTConfig(max_length=28, truncation_mode="drop"))
    assert (len(kept), report.num_overlong, report.num_truncated, report.eos_in_loss) == (2, 1, 0, 1.0)
    assert "1 over-long and dropped" in report.summary()


def test_keeping_the_end_keeps_the_last_tokens(tokenizer: Any) -> None:
    whole = tokenize_sft([CHAT], tokenizer, SFTConfig(assistant_only_loss=False))[0][0].token_ids
    (row,), report = tokenize_sft([CHAT], tokenizer, SFTConfig(max_length=4, truncation_mode="keep_end"))
    assert whole[-4:] == [*row.token_ids, tokenizer.convert_tokens_to_ids("Ċ")]
    assert row.loss_mask == [False, True, True]
    assert report.num_truncated == 1


def test_an_eos_other_than_the_templates_end_token_gives_a_warning() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    _, report = tokenize_sft([CHAT], tokenizer, SFTConfig())
    assert report.end_of_turn == "<|im_end|>"
    assert "set eos_token: '<|im_end|>'" in report.warnings[0]
    assert tokenize_sft([CHAT], tokenizer, SFTConfig(eos_token="<|im_end|>"))[1].warnings == []


def test_prompts_carry_content_and_columns(tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": [USER], "solution": "46", "level": 1},
        {"prompt": "1 + 1 =", "solution": "2"},
    ]
    prompts, report = tokenize_prompts(rows, tokenizer, max_prompt_length=None)
    assert [prompt.index for prompt in prompts] == [0, 1]
    assert tokenizer.decode(prompts[0].token_ids) == HEAD
    assert prompts[0].content == [USER]
    assert prompts[0].columns == {"solution": "46", "level": 1}
    assert tokenizer.convert_ids_to_tokens(prompts[1].token_ids) == ["1", "Ġ+", "Ġ", "1", "Ġ="]
    assert (prompts[1].content, prompts[1].columns) == ("1 + 1 =", {"solution": "2"})
    assert (report.num_kept, report.num_tokens, report.lengths["max"]) == (2, 21, 16)
    assert rows[0] == {"prompt": [USER], "solution": "46", "level": 1}


def test_overlong_prompts_are_dropped_or_refused(tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "1" * length} for length in (3, 5, 4, 9)]
    prompts, report = tokenize_prompts(rows, tokenizer, max_prompt_length=4)
    assert [prompt.index for prompt in prompts] == [0, 2]
    assert report.num_overlong == 2
    with pytest.raises(
        DataError, match=r"2 of 4 prompts are longer than max_prompt_length=4 tokens: row 1 has 5, row 3"
    ):
        tokenize_prompts(rows, tokenizer, max_prompt_length=4, overlong="refuse")
    with pytest.raises(DataError, match="4 of 4 prompts"):
        tokenize_prompts(rows, tokenizer, max_prompt_length=2)


def test_prompts_with_nothing_to_generate_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row 0: the prompt ends in an assistant message"):
        tokenize_prompts([{"prompt": [USER, ANSWER]}], tokenizer, max_prompt_length=None)
    with pytest.raises(DataError, match=r"row 1: the prompt is empty"):
        tokenize_prompts([{"prompt": "1"}, {"prompt": ""}], tokenizer, max_prompt_length=None)
    with pytest.raises(DataError, match="the dataset is empty"):
        tokenize_prompts([], tokenizer, max_prompt_length=None)


def test_many_rows_keep_their_order(tokenizer: Any) -> None:
    rows = load_rows(SourceConfig(generator="arithmetic", args={"kind": "sft", "size": 1300}), seed=0)
    kept, report = tokenize_sft(rows, tokenizer, SFTConfig())
    assert report.num_kept == 1300
    for row, out in zip(rows, kept, strict=True):
        assert tokenizer.decode(out.token_ids).startswith(
            f"<|im_start|>user\n{row['messages'][0]['content']}<|im_end|>"
        )


def test_files_in_formats_of_public_data_sets_are_learned(tokenizer: Any) -> None:
    for name, count in (("instructions_zh.json", 22), ("tools.json", 10)):
        rows = load_rows(SourceConfig(path=str(SAMPLES / name)), seed=0)
        kept, report = tokenize_sft(rows, tokenizer, SFTConfig(max_length=None))
        assert (report.num_kept, report.eos_in_loss, report.warnings) == (count, 1.0, [])
        last = rows[0]["messages"][-1]["content"]
        assert tokenizer.decode(kept[0].token_ids).endswith(f"<|im_start|>assistant\n{BLOCK}{last}<|im_end|>")
    source = SourceConfig(
        path=str(SAMPLES / "word_problems.jsonl"),
        columns={"prompt": "question", "solution": "answer"},
        system_prompt="Put the answer in \\boxed{}.",
    )
    prompts, report = tokenize_prompts(load_rows(source, seed=0), tokenizer, max_prompt_length=128)
    assert report.num_kept + report.num_overlong == 24
    assert report.num_overlong > 0
    assert prompts[0].columns["solution"].endswith("#### 72")
    assert tokenizer.decode(prompts[0].token_ids).startswith(
        "<|im_start|>system\nPut the answer in \\boxed{}.<|im_end|>"
    )
