"""Test on-policy distillation: the student samples, and the teacher's distribution at each token is the target."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rlqwen import DistillationConfig, DistillationTrainer
from rlqwen.errors import ConfigError, ModelError
from rlqwen.models.loading import check_same_tokens
from rlqwen.models.tiny import build_tiny_qwen3
from tests.trainers.test_grpo import ROWS, prefers_even


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("teacher") / "qwen3", hidden_size=96)


def make_trainer(
    model: Path,
    folder: Path,
    teacher_model: str | None,
    *,
    rewards: Sequence[Callable[..., Any]] = (),
    eval_dataset: list[dict[str, Sequence[Any]]] | None = None,
    **options: Any,
) -> DistillationTrainer:
    """Build a trainer that samples with the transformers engine in this process."""
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "max_completion_length": 6, "max_steps": 3,
        "learning_rate": 3e-3, "save_strategy": "no", "rollout": {"engine": "transformers"},
        "scoring": {"in_process": [reward.__name__ for reward in rewards]},
    }  # fmt: skip
    return DistillationTrainer(
        str(model),
        teacher_model,
        DistillationConfig(**defaults | options),
        ROWS,
        eval_dataset,
        reward_funcs=list(rewards),
    )


def test_the_kl_to_a_teacher_of_another_size_falls(tiny_model_path: Path, teacher_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model_path, tmp_path, str(teacher_path), max_steps=20, eval_dataset=ROWS[:4], eval_on_start=True
    )
    trainer.train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final_eval"]["eval/kl"] < 0.5 * summary["initial_eval"]["eval/kl"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["loss"] == pytest.approx(entry["kl"], rel=1e-5) for entry in logged)
    assert not any(key.startswith("reward/") for entry in logged for key in entry)


def test_rewards_are_logged_if_given(tiny_model_path: Path, teacher_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, str(teacher_path), rewards=[prefers_even])
    trainer.train()
    assert "reward/prefers_even/mean" in trainer.state.log_history[0]


def test_micro_batches_change_only_rounding(tiny_model_path: Path, teacher_path: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 1, "optim": "adamw_torch", "adam_epsilon": 1.0}
    weights = []
    for name, split in {
        "whole": {"per_device_train_batch_size": 8},
        "split": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "tokens": {"max_tokens_per_micro_batch": 40},
    }.items():
        trainer = make_trainer(tiny_model_path, tmp_path / name, str(teacher_path), **options | split)
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.policy.trained_parameters]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-6, rtol=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model_path: Path, teacher_path: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 4,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    make_trainer(tiny_model_path, tmp_path / "whole", str(teacher_path), **options).train()
    folder = tmp_path / "cut"
    make_trainer(tiny_model_path, folder, str(teacher_path), **options | {"max_steps": 2}).train()
    resumed = make_trainer(tiny_model_path, folder, str(teacher_path), **options, resume_allow_changes=True)
    resumed.train(resume_from_checkpoint=True)

    def losses(run: Path) -> list[tuple[Any, Any]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("teacher", "options", "text"),
    [
        (None, {}, "distillation needs a teacher"),
        ("here", {"teacher": "there"}, "the teacher is given twice"),
    ],
)
def test_exactly_one_teacher_is_required(
    tiny_model_path: Path, tmp_path: Path, teacher: str | None, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        make_trainer(tiny_model_path, tmp_path, teacher, **options)


def test_a_teacher_with_other_token_ids_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    other = build_tiny_qwen3(tmp_path / "other", hidden_size=96)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(
        ModelError, match=r"teacher_model .* has another tokenizer: 2 tokens have other ids there, such as 'a'"
    ):
        make_trainer(tiny_model_path, tmp_path / "run", str(other))


def test_tokens_that_a_teacher_lacks_are_noted(
    tiny_model_path: Path, teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.add_tokens(["<one_more>"])
    assert check_same_tokens(str(teacher_path), AutoTokenizer.from_pretrained(tiny_model_path), "teacher_model") is None
    note = check_same_tokens(str(teacher_path), tokenizer, "teacher_model")
    assert note is not None
    assert note.endswith("was not trained with 1 of the tokens, such as '<one_more>'")


def test_a_teacher_without_a_tokenizer_is_taken_at_its_word(tiny_model_path: Path, tmp_path: Path) -> None:
    teacher = build_tiny_qwen3(tmp_path / "teacher", hidden_size=96)
    for path in teacher.glob("tokenizer*"):
        path.unlink()
    make_trainer(tiny_model_path, tmp_path / "run", str(teacher))
