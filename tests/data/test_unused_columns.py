"""Test that unused columns and message keys are reported by the report, `rlqwen check` and `rlqwen data check`."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import DPOConfig, Recipe, RewardConfig, SFTConfig
from rlqwen.data import as_rows, tokenize_preference_examples, tokenize_prompts, tokenize_reward_rows, tokenize_sft
from rlqwen.data.cleaning.texts import Row
from rlqwen.models.tiny import build_tokenizer
from rlqwen.preflight import check_recipe
from rlqwen.rewards.registry import Reward, resolve, taken_columns

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = ANSWER | {"content": "b"}
CALL: dict[str, Any] = {"id": "1", "type": "function", "index": 0, "function": {"name": "f", "arguments": {}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"messages": [USER, ANSWER]}, None),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}], "system": "s"}, None),
        ({"messages": [USER, ANSWER], "question": "q", "id": None, "note": float("nan")}, "columns not used: question"),
        (
            {"messages": [{"role": "system", "content": "own"}, USER, ANSWER], "question": "q", "system": "other"},
            "columns not used: question, system",
        ),
        ({"messages": [USER | {"name": "x"}, ANSWER | {"weight": 1}]}, "message keys not used: name"),
        ({"messages": [USER | {"weight": 1}, ANSWER]}, "message keys not used: weight"),
        ({"messages": [USER, ANSWER | {"tool_calls": [CALL]}]}, "message keys not used: tool_calls.index"),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"function": CALL["function"] | {"strict": True}}]}]},
            "message keys not used: tool_calls.function.strict",
        ),
        (
            {"conversations": [{"from": "human", "value": "q", "at": 1}, {"from": "gpt", "value": "a"}], "id": 1},
            "columns not used: id; message keys not used: at",
        ),
        ({"instruction": "q", "input": "", "output": "a", "text": "q a"}, "columns not used: text"),
        ({"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}, "columns not used: tools"),
        ({"prompt": [USER], "completion": "a", "tools": [{"name": "f"}], "weight": 0.5}, "columns not used: weight"),
        ({"prompt": [USER], "completion": [ANSWER | {"at": 1}]}, "message keys not used: at"),
        ({"text": "q", "source": "s"}, "columns not used: source"),
    ],
)
def test_unused_columns_and_keys_of_sft_rows_are_reported(
    tokenizer: Any, row: dict[str, Any], note: str | None
) -> None:
    report = tokenize_sft(as_rows([row]), tokenizer, SFTConfig())[1]
    assert report.notes == ([note] if note else [])


def test_a_key_that_the_template_reads_is_not_reported(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    row = {"messages": [USER | {"name": "Ann", "at": 1}, ANSWER]}
    own.chat_template = own.chat_template.replace("{{- '<|im_start|>' +", "{{- message.name }}{{- '<|im_start|>' +")
    assert tokenize_sft([row], tokenizer, SFTConfig())[1].notes == ["message keys not used: at, name"]
    assert tokenize_sft([row], own, SFTConfig())[1].notes == ["message keys not used: at"]


def test_a_reference_column_of_evaluation_is_not_reported(tokenizer: Any) -> None:
    row = {"messages": [USER, ANSWER], "gold": "a"}
    config = SFTConfig(eval_generation={"metrics": ["exact_match"], "reference": "gold"})
    assert tokenize_sft(as_rows([row]), tokenizer, config)[1].notes == []


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
SCORES = {"score_chosen": 2.0, "score_rejected": 1.0}


@pytest.mark.parametrize(
    ("row", "dpo", "reward"),
    [
        (PAIR, None, None),
        (PAIR | {"margin": 1.0}, "columns not used: margin", None),
        *(
            ({"instruction": "q", "output": "a", "chosen": "a", "rejected": "b"}, line, line)
            for line in ["columns not used: output"]
        ),
        *(
            (
                {
                    "input": {"messages": [USER], "parallel_tool_calls": True},
                    "preferred_output": [ANSWER],
                    "non_preferred_output": [OTHER],
                },
                line,
                line,
            )
            for line in ["columns not used: input.parallel_tool_calls"]
        ),
        (PAIR | SCORES, "columns not used: score_chosen, score_rejected", None),
        *(
            (PAIR | {"chosen": [USER, ANSWER], "rejected": [USER, OTHER | {"at": 1}], "messages": [USER]}, line, line)
            for line in ["columns not used: messages; message keys not used: at"]
        ),
    ],
)
def test_unused_columns_of_pairs_are_reported(tokenizer: Any, row: Row, dpo: Any, reward: Reward) -> None:
    for report, note in (
        (tokenize_preference_examples(as_rows([row]), tokenizer, DPOConfig())[1], dpo),
        (tokenize_reward_rows(as_rows([row]), tokenizer, RewardConfig())[1], reward),
    ):
        assert report.notes == ([note] if note else [])


def test_unused_columns_of_labelled_answers_are_reported(tokenizer: Any) -> None:
    row = {"prompt": "q", "completion": "a", "label": True, "id": 1}
    report = tokenize_preference_examples(as_rows([row]), tokenizer, DPOConfig(loss_type="kto"))[1]
    assert report.notes == ["columns not used: id"]


def takes_solution(completions: list[str], solution: list[str]) -> list[float]:
    return [0.0] * len(completions)


def takes_all(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("row", "rewards", "note"),
    [
        ({"prompt": "q", "solution": "1"}, [takes_solution], None),
        ({"prompt": "q", "solution": "1", "level": 3, "tools": []}, [takes_solution], "columns not used: level, tools"),
        ({"prompt": [USER | {"at": 1}], "level": 3}, [takes_all], "message keys not used: at"),
        ({"messages": [USER, ANSWER]}, [takes_solution], None),
        (
            {"messages": [USER, ANSWER], "solution": "1"},
            [takes_solution],
            "columns not used: the last answer of messages",
        ),
        ({"prompt": "q", "completion": "a", "solution": "1"}, [takes_solution], "columns not used: completion"),
        ({"prompt": "q", "messages": [USER], "solution": "1"}, [takes_solution], "columns not used: messages"),
    ],
)
def test_columns_of_prompts_that_rewards_read_are_not_reported(
    tokenizer: Any, row: dict[str, Any], rewards: Sequence[str | Callable[..., Any]], note: str | None
) -> None:
    report = tokenize_prompts(as_rows([row]), tokenizer, max_prompt_length=None)[1]
    report.name_unused(taken_columns(resolve(reward) for reward in rewards))
    assert report.notes == ([note] if note else [])


def test_check_reports_unused_columns_for_sft_and_rewards(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "sft.jsonl").write_text(json.dumps({"messages": [USER, ANSWER | {"at": 1}], "id": 1}))
    (tmp_path / "rl.jsonl").write_text(json.dumps({"prompt": "1 + 1", "solution": "2", "id": 1}))
    base = {"model": {"path": str(tiny_model_path)}, "output_dir": str(tmp_path / "run")}
    sft = base | {"algorithm": "sft", "data": {"train": {"path": str(tmp_path / "sft.jsonl")}}}
    (tmp_path / "rewards.py").write_text("def f(completions, solution): return [0.0] * len(completions)")
    rl = base | {
        "algorithm": "grpo",
        "data": {"train": {"path": str(tmp_path / "rl.jsonl")}},
        "rewards": [f"{tmp_path}/rewards.py:f"],
        "rollout": {"engine": "transformers"},
    }
    wanted = "data.train: columns not used: id; message keys not used: at"
    assert wanted in check_recipe(Recipe.parse(sft)).warnings
    assert "data.train: columns not used: id" in check_recipe(Recipe.parse(rl)).warnings
