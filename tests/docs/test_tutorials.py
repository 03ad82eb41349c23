"""What the tutorials say that rlqwen says, it says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlqwen.cli import main
from tests.docs.pages import ROOT

TUTORIALS = ROOT / "docs" / "tutorials"
TINY = ["model.path=builtin:tiny-qwen3", "output_dir=runs/x"]
QUESTIONS = [*TINY, "data.train.path=builtin:questions", "train.max_completion_length=256"]
PAIRS = [*TINY, "data.train.path=builtin:pairs"]
USER = {"role": "user", "content": "2 + 2 = ?"}
FILES: dict[str, list[dict[str, Any]]] = {
    "qa.jsonl": [{"query": "2 + 2 = ?", "reply": "4"}],
    "half.jsonl": [{"prompt": "2 + 2 = ?", "chosen": "4"}],
    "equal.jsonl": [
        {"prompt": [USER], "chosen": [answer], "rejected": [{"role": "assistant", "content": "4"}]}
        for answer in ({"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"})
    ],
}
PROVOKED = {
    ("sft", "columns with other names"): ["sft_gsm8k_qwen3_0.6b", *TINY, "data.train={path: qa.jsonl}"],
    ("sft", "no answers, or answers behind `max_length`"): [
        "sft_gsm8k_qwen3_0.6b", *TINY, "data.train.path=builtin:questions", "train.max_length=64",
    ],
    ("sft", "a misspelled key"): ["sft_gsm8k_qwen3_0.6b", "train.learning_rte=1"],
    ("reward-model", "an answer is missing"): ["reward_en_qwen3_0.6b", *TINY, "data.train={path: half.jsonl}"],
    ("reward-model", "equal answers"): ["reward_en_qwen3_0.6b", *TINY, "data.train={path: equal.jsonl}"],
    ("reward-model", "`max_length` is too small"): ["reward_en_qwen3_0.6b", *PAIRS, "train.max_length=64"],
    ("dpo", "a misspelled loss"): ["dpo_en_qwen3_0.6b", "train.loss_type=sigmod"],
    ("dpo", "settings that do not go together"): [
        "dpo_en_qwen3_0.6b", "train.loss_type=[ipo]", "train.label_smoothing=0.1",
    ],
    ("ppo", "the batch does not divide"): ["ppo_gsm8k_qwen3_0.6b", "train.num_generations=3"],
    ("ppo", "a KL without a gradient"): ["ppo_gsm8k_qwen3_0.6b", "train.kl_penalty=loss"],
    ("ppo", "a name of TRL that means nothing here"): ["ppo_gsm8k_qwen3_0.6b", "train.sft_model_path=x"],
    ("grpo", "the batch does not divide into groups"): ["grpo_gsm8k_qwen3_0.6b", "train.num_generations=6"],
    ("grpo", "a misspelled reward"): ["grpo_gsm8k_qwen3_0.6b", *QUESTIONS, "rewards=[acuracy]"],
    ("grpo", "a column that the reward needs is missing"): [
        "grpo_gsm8k_qwen3_0.6b", *QUESTIONS, "data.train={path: qa.jsonl, columns: {prompt: query}}",
    ],
    ("grpo", "the context is too small"): ["grpo_gsm8k_qwen3_0.6b", *QUESTIONS, "train.max_completion_length=2048"],
    ("distillation", "a wrong path"): [
        "distillation_gsm8k_qwen3_0.6b", *QUESTIONS, "train.teacher=runs/teacher/final",
    ],
}  # fmt: skip
"""Page and cause -> the arguments of `rlqwen check` that give the message."""
ELSEWHERE = {
    ("dpo", "an answer is missing, or both are equal"),
    ("ppo", "a KL that runs away"),
    ("grpo", "a reward that raises"),
    ("distillation", "no teacher"),
    ("distillation", "two teachers"),
}
"""Messages of a run, which tests/monitoring, tests/rewards and tests/trainers provoke."""


def causes(page: Path) -> dict[str, str]:
    """Return cause -> message of the page's table of what goes wrong."""
    part = page.read_text("utf-8").partition("| Cause | Message (shortened) |")[2]
    rows = [re.split(r"(?<!\\)\|", line.strip("|"))[:2] for line in part.splitlines() if line.startswith("| ")]
    return {cause.strip(): message.strip() for cause, message in rows}


def squeeze(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def test_every_cause_is_provoked() -> None:
    named = {(page.stem, cause) for page in TUTORIALS.glob("*.md") for cause in causes(page)}
    assert named == PROVOKED.keys() | ELSEWHERE


@pytest.mark.parametrize("key", PROVOKED, ids=" ".join)
def test_the_message_is_what_the_page_says(
    key: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, cause = key
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    for name, rows in FILES.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["check", *PROVOKED[key]])
    said = squeeze(" ".join(capsys.readouterr()))
    quoted = re.findall(r"`(.+?)`", causes(TUTORIALS / f"{page}.md")[cause])
    assert quoted
    for part in (part for quote in quoted for part in re.split(r"\s*\(?\.\.\.\)?\}?\)?\s*", quote) if part):
        assert squeeze(part) in said
