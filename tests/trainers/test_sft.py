"""Test SFT: learning, micro-batches, packing, adapters, callbacks, best checkpoints and refusals."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlqwen import SFTConfig, SFTTrainer
from rlqwen.data import TokenizedRow
from rlqwen.data.sequence_packing import pack_best_fit
from rlqwen.errors import ConfigError, DataError, NonFiniteError
from tests.narrowing import present


def rows(count: int = 24) -> list[dict[str, Any]]:
    """Return conversations of many lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {i} {'x' * (i % 7)}"},
                {"role": "assistant", "content": str(i) * (1 + i % 5)},
            ]
        }
        for i in range(count)
    ]


def make_trainer(
    model: Path, folder: Path, *, train: list[Any] | None = None, peft_config: Any | None = None, **options: Any
) -> SFTTrainer:
    defaults = {"output_dir": str(folder), "per_device_train_batch_size": 8, "max_steps": 3, "save_strategy": "no"}
    return SFTTrainer(
        str(model),
        args=SFTConfig(**defaults | options),
        train_dataset=rows() if train is None else train,
        eval_dataset=rows(6),
        peft_config=peft_config,
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_run_learns_and_completes_its_folder(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path / "run", learning_rate=3e-3, max_steps=12, eval_on_start=True)
    trainer.train()
    curve = losses(trainer)
    assert curve[-1] < 0.85 * curve[0]  # measured for three seeds and models: 0.67 to 0.68
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final_eval"]["eval/loss"] < summary["initial_eval"]["eval/loss"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "grad_norm", "learning_rate", "time/step", "tokens/trained"} <= lines[1].keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert torch.equal(*(one.get_parameter("model.embed_tokens.weight") for one in (model, trainer.model)))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").chat_template


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"max_tokens_per_micro_batch": 60},
    ],
)
def test_micro_batches_change_only_rounding(tiny_model_path: Path, tmp_path: Path, split: dict[str, Any]) -> None:
    whole = make_trainer(tiny_model_path, tmp_path / "whole")
    parts = make_trainer(tiny_model_path, tmp_path / "parts", **split)
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_packing_changes_the_batch_and_not_the_loss(tiny_model_path: Path, tmp_path: Path) -> None:
    plain = make_trainer(tiny_model_path, tmp_path / "plain", per_device_train_batch_size=24, max_steps=1)
    packed = make_trainer(tiny_model_path, tmp_path / "packed", packing=True, max_length=64, max_steps=1)
    assert len(packed.train_rows) < 24
    packed.args.per_device_train_batch_size = len(packed.train_rows)
    plain.train()
    packed.train()
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-5)


def test_packed_rows_hold_every_sequence_once_within_capacity() -> None:
    lengths = [5, 9, 3, 3, 7, 1, 2, 10, 6, 4]
    packed = pack_best_fit([TokenizedRow([0] * n, [True] * n) for n in lengths], capacity=10)
    assert sorted(len(row.token_ids) for sequences in packed for row in sequences) == sorted(lengths)
    assert len(packed) == 5
    assert all(sum(len(row.token_ids) for row in sequences) <= 10 for sequences in packed)


def test_early_stopping_restores_the_best_checkpoint(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model_path, tmp_path, learning_rate=0.5, max_steps=20, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, early_stopping_patience=2, save_total_limit=1, max_nonfinite_steps=20,
    )  # fmt: skip
    trainer.train()
    evals = [entry["eval/loss"] for entry in trainer.state.log_history if "eval/loss" in entry]
    # A learning rate of 0.5 destroys the model at once, so the first evaluation is the best, and two worse ones stop it.
    assert trainer.state.global_step < 20
    assert evals[-1] == pytest.approx(min(evals), rel=1e-5)
    best = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert best == [f"step-{trainer.state.best_global_step:06d}"]


def test_lora_trains_only_the_adapter_and_saves_a_merged_model(tiny_model_path: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_path),
        args=SFTConfig(output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, save_strategy="no"),
        train_dataset=rows(),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    before, after = base.state_dict(), merged.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("proj" in name for name in moved)
    assert (tmp_path / "final" / "adapter" / "adapter_model.safetensors").exists()


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.events.append("begin")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = present(metrics)
        self.events.append(f"eval {metrics['eval_loss'] == metrics['eval/loss']}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        control.should_evaluate = state.global_step == 1
        control.should_training_stop = state.global_step == 2
        return control


def test_callbacks_control_the_run(tiny_model_path: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = SFTTrainer(
        str(tiny_model_path),
        args=SFTConfig(output_dir=str(tmp_path), max_steps=9, save_strategy="no"),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[recorder],
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert recorder.events == ["begin", "eval True", "eval True"]


def test_a_folder_that_holds_a_run_is_refused_and_kept(tiny_model_path: Path, tmp_path: Path) -> None:
    make_trainer(tiny_model_path, tmp_path, max_steps=1).train()
    kept = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="holds a run already"):
        make_trainer(tiny_model_path, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    make_trainer(tiny_model_path, tmp_path, max_steps=1, overwrite_output_dir=True).train()


def test_evaluate_works_without_training(tiny_model_path: Path, tmp_path: Path) -> None:
    metrics = make_trainer(tiny_model_path, tmp_path).evaluate()
    assert metrics["eval/perplexity"] == pytest.approx(torch.tensor(metrics["eval/loss"]).exp().item(), rel=1e-4)


@pytest.mark.fault("a weight that is NaN", "every batch is kept, including the one that stops the run")
def test_every_nonfinite_batch_is_kept_including_the_one_that_stops_the_run(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, max_steps=5, max_nonfinite_steps=2)
    with torch.no_grad():
        trainer.policy.trained_parameters[0].fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="2 updates in a row"):
        trainer.train()
    kept = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert kept == ["step-000001-0.safetensors", "step-000002-0.safetensors"]


def test_empty_training_data_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        make_trainer(tiny_model_path, tmp_path, train=[])


def test_two_runs_with_the_same_seed_are_equal(tiny_model_path: Path, tmp_path: Path) -> None:
    runs = [make_trainer(tiny_model_path, tmp_path / str(i)) for i in range(2)]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == losses(runs[1])
