"""Test pairs of a model's own answers: which answers are paired, and recipes that sample them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlqwen.cli import main
from rlqwen.config import SampledPairsConfig, SourceConfig
from rlqwen.config.recipe_yaml import load_recipe
from rlqwen.data import load_rows
from rlqwen.errors import ConfigError, DataError
from rlqwen.evaluation.eval_config import evaluation_config
from rlqwen.runs.pairs import _pairs_of, draw_pairs
from rlqwen.types import Completion, Group, Prompt
from tests.narrowing import only_source, present

SUMS = {"generator": "arithmetic", "args": {"size": 6}}


def group_of(*rewards: float | None, content: str | list[dict[str, str]] = "2 + 2 = ") -> Group:
    completions = [Completion([place], [], "stop", f"answer {place}") for place in range(len(rewards))]
    group = Group(Prompt(0, [1], content, {"solution": "4"}), completions, 0)
    group.total_rewards_G = list(rewards)
    return group


def sampled(**options: Any) -> SampledPairsConfig:
    return SampledPairsConfig.parse({"prompts": SUMS, "rewards": ["accuracy"], **options})


def ranks(rows: list[dict[str, Any]] | Iterator[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(row["chosen"], row["rejected"]) for row in rows]


def test_the_best_answer_is_paired_with_the_worst() -> None:
    rows = list(_pairs_of(group_of(0.5, 1.0, None, 0.0), sampled(pairs_per_prompt=9)))
    assert ranks(rows) == [("answer 1", "answer 3")]  # the middle answer has no other one to be paired with
    assert rows[0]["chosen_reward"] == 1.0
    assert rows[0]["solution"] == "4"


def test_answers_with_equal_rewards_make_no_pair() -> None:
    rewards = (1.0, 1.0, 0.0, 1.0, 0.0, 1.0)
    assert ranks(_pairs_of(group_of(*rewards), sampled(pairs_per_prompt=9))) == [
        ("answer 0", "answer 4"),
        ("answer 1", "answer 2"),
    ]
    assert len(list(_pairs_of(group_of(*rewards), sampled()))) == 1
    assert not list(_pairs_of(group_of(1.0, 1.0), sampled()))
    assert not list(_pairs_of(group_of(0.6, 0.5), sampled(min_gap=0.2)))
    assert not list(_pairs_of(group_of(None, 1.0), sampled()))


def test_answers_to_conversations_are_messages() -> None:
    (row,) = _pairs_of(group_of(0.0, 1.0, content=[{"role": "user", "content": "2 + 2 = ?"}]), sampled())
    assert row["chosen"] == [{"role": "assistant", "content": "answer 1"}]


def write_reward(folder: Path) -> str:
    (folder / "ends.py").write_text(
        "def evenness(completion_ids, **kwargs):\n    return [float(ids[0] % 2 == 0) for ids in completion_ids]\n"
    )
    return f"{folder / 'ends.py'}:evenness"


def test_a_recipe_samples_its_pairs_and_trains_on_them(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = {
        "prompts": SUMS, "rewards": [write_reward(tmp_path)], "num_samples": 6, "max_tokens": 4,
        "rollout": {"engine": "transformers"},
    }  # fmt: skip
    recipe = {
        "algorithm": "dpo",
        "model": {"path": str(tiny_model_path)},
        "data": {"train": {"sampled": pairs}, "eval": {"sampled": pairs}},
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "eval_on_start": True},
        "output_dir": "run",
    }
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["check", "dpo.yaml"]) == 0
    assert "pairs to be sampled: 6 prompts x 6 answers" in capsys.readouterr().out
    assert main(["run", "dpo.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "train: sampling 6 answers to each prompt" in printed
    rows = [json.loads(line) for line in (tmp_path / "run/pairs/train.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["chosen_reward"] == 1.0 and row["rejected_reward"] == 0.0 for row in rows)
    resolved = load_recipe("run/recipe.yaml")
    sampled = present(only_source(resolved.data.train).sampled)
    assert sampled.num_samples == 6  # the recipe as it was written, without the sampled pairs
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["final_eval"]["eval/rewards/margins"] != 0


def test_the_command_writes_a_file_but_never_overwrites_one(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "data", "pairs", str(tiny_model_path), "--data", "arithmetic", "--rewards", write_reward(tmp_path), "--limit",
        "4", "-k", "6", "--max-tokens", "3", "--engine", "transformers", "--output", "pairs.jsonl",
    ]  # fmt: skip
    assert main(command) == 0
    assert "in pairs.jsonl" in capsys.readouterr().out
    before = (tmp_path / "pairs.jsonl").read_text()
    assert {"prompt", "chosen", "rejected", "solution"} <= json.loads(before.splitlines()[0]).keys()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "pairs.jsonl").read_text() == before


def test_prompts_without_differing_rewards_are_refused(tiny_model_path: Path) -> None:
    config = sampled(num_samples=2, max_tokens=2, rollout={"engine": "transformers"})
    with pytest.raises(DataError, match=r"none of 6 prompts has answers .* whose rewards differ"):
        draw_pairs(str(tiny_model_path), config)


def test_pairs_that_were_not_sampled_are_refused_as_rows() -> None:
    source = SourceConfig(sampled=sampled())
    with pytest.raises(DataError, match="have not been sampled yet"):
        load_rows(source, seed=0)


def test_sources_of_rows_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give one of 'path'"):
        SourceConfig.parse({"path": "x.jsonl", "sampled": {"prompts": SUMS, "rewards": ["accuracy"]}})
    nested = {"prompts": {"sampled": {"prompts": SUMS, "rewards": ["accuracy"]}}, "rewards": ["accuracy"]}
    with pytest.raises(ConfigError, match="prompts that are there"):
        SourceConfig.parse({"sampled": nested})


def test_eval_of_a_recipe_with_sampled_pairs_uses_its_prompts() -> None:
    config = evaluation_config("builtin:tiny-qwen3", "quickstart_dpo")
    assert only_source(config.data).generator == "arithmetic"
    assert [spec.name for spec in config.rewards] == ["accuracy"]
    assert config.max_tokens == 32
