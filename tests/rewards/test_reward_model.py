"""Test reward models, which score in the trainer's process beside plain rewards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from rlqwen.config import ScoringConfig
from rlqwen.errors import ModelError, RewardSpecError
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.rewards import Scorer, build_rewards
from rlqwen.types import Completion, Group, Message, Prompt


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("models") / "policy", hidden_size=64, num_layers=2)


@pytest.fixture(scope="module")
def judge_folder(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random reward model with a classification head."""
    folder = tmp_path_factory.mktemp("models") / "judge"
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    config = Qwen3Config.from_pretrained(policy_folder, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_group(prompt: str | list[Message], *texts: str) -> Group:
    completions = [Completion([1], [0.0], "stop", text) for text in texts]
    return Group(Prompt(0, [1, 2], prompt), completions, policy_version=0)


def expected(folder: Path, text: str) -> float:
    """Return the logit of one text, without padding and batching."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return float(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0])


def as_path(folder: Path) -> Any:
    return str(folder)


def as_module(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("form", [as_path, as_module])
def test_scores_are_the_model_s_logits(form: Callable[[Path], Any], judge_folder: Path) -> None:
    def length(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    rewards = build_rewards([form(judge_folder), length], [{"batch_size": 2}, {}])
    assert [reward.name for reward in rewards] == ["judge", "length"]
    group = make_group("2+2=", "4", "a much longer answer", "5")
    with Scorer(rewards, ScoringConfig(), weights=[2.0, 1.0]) as scorer:
        scorer.score([group])
    scores = [expected(judge_folder, f"2+2={text}") for text in ("4", "a much longer answer", "5")]
    assert group.rewards["judge"] == pytest.approx(scores, abs=1e-5)
    assert len(set(scores)) == 3
    assert group.total_rewards_G[0] == pytest.approx(2 * scores[0] + 1, abs=1e-5)


def test_conversations_are_rendered_with_the_chat_template(judge_folder: Path) -> None:
    prompt = [{"role": "user", "content": "2+2="}]
    group = make_group(prompt, "4")
    with Scorer(build_rewards(str(judge_folder)), ScoringConfig()) as scorer:
        scorer.wait_until_ready()
        scorer.score([group])
    tokenizer = AutoTokenizer.from_pretrained(judge_folder)
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "4"}], tokenize=False)
    assert group.rewards["judge"] == pytest.approx([expected(judge_folder, str(text))], abs=1e-5)


def test_a_module_without_a_path_uses_the_tokenizer_of_the_trainer(judge_folder: Path) -> None:
    config = Qwen3Config.from_pretrained(judge_folder, num_labels=1)
    model = Qwen3ForSequenceClassification(config)
    model.config._name_or_path = ""
    group = make_group("2+2=", "4")
    tokenizer = AutoTokenizer.from_pretrained(judge_folder)
    with Scorer(build_rewards(model), ScoringConfig(), tokenizer=tokenizer) as scorer:
        scorer.score([group])
    assert group.call_statuses["Qwen3ForSequenceClassification"] == ["ok"]
    with (
        Scorer(build_rewards(model), ScoringConfig()) as scorer,
        pytest.raises(ModelError, match="pass its tokenizer"),
    ):
        scorer.wait_until_ready()


def test_a_model_without_a_trained_head_is_refused(policy_folder: Path) -> None:
    group = make_group("2+2=", "4")
    with (
        Scorer(build_rewards(str(policy_folder)), ScoringConfig()) as scorer,
        pytest.raises(ModelError, match=r"policy.*lacks weights \(score.weight\)"),
    ):
        scorer.score([group])


def test_build_rewards_recognizes_each_kind_of_entry(judge_folder: Path) -> None:
    def accuracy(completions: list[str]) -> list[float]:
        return [0.0]

    rewards = build_rewards(["accuracy", accuracy, str(judge_folder), "Qwen/some-reward-model"])
    assert [reward.name for reward in rewards] == ["accuracy", "accuracy_2", "judge", "some-reward-model"]
    with pytest.raises(RewardSpecError, match="only the argument 'batch_size'"):
        build_rewards([str(judge_folder)], [{"batchsize": 2}])
    with pytest.raises(RewardSpecError, match="1 args for 2 rewards"):
        build_rewards([accuracy, accuracy], [{}])
