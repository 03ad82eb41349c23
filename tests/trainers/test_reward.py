"""Test reward modeling: the loss against TRL's, the saved model, and refusals."""

import json
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlqwen import RewardConfig, RewardTrainer
from rlqwen.algorithms.losses import Totals
from rlqwen.errors import ConfigError, DataError, ModelError
from rlqwen.rewards.reward_model import RewardModel
from tests.losses import reward_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL's import warns about the version of vLLM
    from trl import RewardTrainer as TrlRewardTrainer


def pair(number: int, **columns: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"{number} + 1 = ?"}],
        "chosen": [{"role": "assistant", "content": f"{number + 1} yes"}],
        "rejected": [{"role": "assistant", "content": f"{number + 2} no no"}],
        **columns,
    }


ROWS = [pair(number) for number in range(24)]


def make_trainer(
    model: Path,
    folder: Path,
    rows: list[dict[str, Any]] = ROWS,
    eval_rows: list[dict[str, str]] | None = ROWS[:8],
    peft_config: LoraConfig | None = None,
    **options: Any,
) -> RewardTrainer:
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-3,
        "save_strategy": "no",
    }  # fmt: skip
    config = RewardConfig(**defaults | options)
    return RewardTrainer(str(model), config, rows, eval_rows, peft_config=peft_config)


@pytest.mark.parametrize("margin", [None, [0.5, -0.2, 0.0]])
@pytest.mark.parametrize("center", [None, 0.3])
def test_the_loss_equals_trls(margin: list[float] | None, center: float | None) -> None:
    rewards = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [2.0, -1.0]], requires_grad=True)
    inputs = {"attention_mask": torch.ones(6, 1)} | ({} if margin is None else {"margin": torch.tensor(margin)})
    stub: Any = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )

    def model(**kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=rewards.T.reshape(-1, 1))

    compute_loss: Any = TrlRewardTrainer.compute_loss
    theirs = compute_loss(stub, model, inputs)
    margin_S = torch.tensor(margin or [0.0] * 3)
    ours, sums = reward_loss(
        rewards[:, 0], rewards[:, 1], margin_S, Totals(tokens=0, sequences=3), center_coefficient=center
    )
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert sums["rewards/accuracies"].item() / 3 == pytest.approx(stub._metrics["eval"]["accuracy"][0])
    assert sums["rewards/margins"].item() / 3 == pytest.approx(stub._metrics["eval"]["margin"][0])
    grads = [torch.autograd.grad(loss, rewards, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=0)


def test_a_saved_reward_model_scores_like_the_trained_one(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model_path, tmp_path, max_steps=12, eval_strategy="steps", eval_steps=6, eval_on_start=True
    )
    trainer.train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final_eval"]["eval/rewards/accuracies"] == 1.0
    assert summary["final_eval"]["eval/rewards/margins"] > summary["initial_eval"]["eval/rewards/margins"] + 0.5
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "tokens/trained"} <= set(
        last
    )

    scores = RewardModel(str(tmp_path / "final"))
    scores.load()
    chosen = scores([row["prompt"] for row in ROWS[:8]], [row["chosen"] for row in ROWS[:8]])
    rejected = scores([row["prompt"] for row in ROWS[:8]], [row["rejected"] for row in ROWS[:8]])
    margin = sum(good - bad for good, bad in zip(chosen, rejected, strict=True)) / 8
    assert margin == pytest.approx(summary["final_eval"]["eval/rewards/margins"], abs=1e-4)


def test_rows_are_tokenized_as_the_chat_template_renders_them(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    row = trainer.train_rows[0]
    for side, column in ((row.chosen, "chosen"), (row.rejected, "rejected")):
        written = tokenizer.apply_chat_template(ROWS[0]["prompt"] + ROWS[0][column], tokenize=False)
        assert row.prompt_ids + side.token_ids == tokenizer(written, add_special_tokens=False)["input_ids"]
    assert len(row.prompt_ids) > 10  # both answers share this prefix


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"max_tokens_per_micro_batch": 100},
        {"max_tokens_per_micro_batch": 1},
    ],
)
def test_micro_batches_change_only_rounding(tiny_model_path: Path, tmp_path: Path, split: dict[str, int]) -> None:
    rows = [pair(number, margin=number / 10) for number in range(8)]
    options: dict[str, Any] = {"max_steps": 1, "shuffle_dataset": False, "center_rewards_coefficient": 0.1}
    whole = make_trainer(tiny_model_path, tmp_path / "whole", rows, None, **options)
    parts = make_trainer(tiny_model_path, tmp_path / "parts", rows, None, **options | split)
    for trainer in (whole, parts):
        trainer.train()
    entries = [trainer.state.log_history[0] for trainer in (whole, parts)]
    assert entries[1]["loss"] == pytest.approx(entries[0]["loss"], abs=1e-6)
    assert entries[1]["grad_norm"] == pytest.approx(entries[0]["grad_norm"], rel=1e-4)
    assert entries[1]["rewards/margins"] == pytest.approx(entries[0]["rewards/margins"], abs=1e-6)


def test_a_margin_in_the_data_raises_the_loss(tiny_model_path: Path, tmp_path: Path) -> None:
    losses = []
    for name, margin in (("none", None), ("wide", 3.0)):
        rows = [pair(number, margin=margin) for number in range(8)]
        trainer = make_trainer(tiny_model_path, tmp_path / name, rows, None, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] > losses[0] + 1.0


def test_lora_saves_a_merged_model_with_its_head(tiny_model_path: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(tiny_model_path, tmp_path, max_steps=8, learning_rate=5e-3, peft_config=config)
    trainer.train()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert model.score.weight.shape[0] == 1
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert trainer.state.log_history[-1]["eval/rewards/accuracies"] == 1.0


def test_text_pairs_get_no_chat_template(tiny_model_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} is ", "chosen": "good", "rejected": "bad"} for i in range(8)]
    trainer = make_trainer(tiny_model_path, tmp_path, rows, None)
    tokenizer = trainer.processing_class
    row = trainer.train_rows[0]
    assert tokenizer.decode(row.prompt_ids + row.chosen.token_ids) == "0 is good"


def test_padding_at_the_end_of_an_answer_is_not_scored(tiny_model_path: Path, tmp_path: Path) -> None:
    """Score the last token that is not padding, as transformers does."""
    pad = AutoTokenizer.from_pretrained(tiny_model_path).pad_token
    rows = [{"prompt": f"{i} is ", "chosen": f"good{pad}", "rejected": "bad"} for i in range(8)]
    trainer = make_trainer(tiny_model_path, tmp_path, rows, rows)
    chosen, rejected = trainer._tree(trainer.train_rows[0]).branches
    assert trainer.processing_class.decode(chosen.token_ids) == "good"
    assert trainer.processing_class.decode(rejected.token_ids) == "bad"


def test_too_long_pairs_are_left_out(tiny_model_path: Path, tmp_path: Path) -> None:
    rows = [*ROWS, pair(5) | {"chosen": [{"role": "assistant", "content": "x" * 200}]}]
    trainer = make_trainer(tiny_model_path, tmp_path, rows, max_length=60)
    assert len(trainer.train_rows) == len(ROWS)
    assert trainer.reports["train"].num_overlong == 1


def test_refusals(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0"):
        make_trainer(tiny_model_path, tmp_path, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        RewardConfig(chat_template_kwargs={"enable_thinking": False})
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=2)
    with pytest.raises(ModelError, match="num_labels=2"):
        RewardTrainer(
            model,
            RewardConfig(output_dir=str(tmp_path)),
            ROWS,
            processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        )
