"""Test evaluation of SFT by generated text, and the best checkpoint by such a metric."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlqwen import SFTConfig, SFTTrainer
from rlqwen.errors import ConfigError, DataError
from rlqwen.trainers.sft import EvalRows
from tests.narrowing import instance_of


def rows(count: int) -> list[dict[str, Any]]:
    """Return conversations that always end with the answer yes."""
    return [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(count)
    ]


def make_trainer(
    model: Path,
    folder: Path,
    *,
    eval_dataset: Any | None = None,
    generation: dict[str, Any] | None = None,
    **options: Any,
) -> SFTTrainer:
    defaults = {
        "output_dir": str(folder), "max_steps": 20, "learning_rate": 5e-3, "save_strategy": "no",
        "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True,
        "chat_template_kwargs": {"enable_thinking": False},  # four tokens have no room for a think block
    }  # fmt: skip
    generation = {"metrics": ["exact_match", "rouge"], "max_tokens": 4, "limit": 4} | (generation or {})
    args = SFTConfig(**defaults | {"eval_generation": generation} | options)
    return SFTTrainer(
        str(model), args, train_dataset=rows(24), eval_dataset=rows(8) if eval_dataset is None else eval_dataset
    )


def test_a_generation_metric_selects_the_best_checkpoint(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model_path, tmp_path, metric_for_best_model="exact_match", load_best_model_at_end=True, save_total_limit=1
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "eval/exact_match" in entry]
    curve = [entry["eval/exact_match"] for entry in log]
    assert curve[0] == 0
    assert max(curve) == 1
    # Of equal evaluations the first is the best, and that of the untrained model does not count.
    first = next(entry["step"] for entry in log if entry["eval/exact_match"] == 1)
    assert trainer.state.best_global_step == first
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{first:06d}"]
    assert log[-1]["eval/rouge_l"] == 1
    assert {"eval/loss", "eval/perplexity", "eval/completions/mean_length", "eval/completions/truncated"} <= log[
        -1
    ].keys()
    written = [json.loads(line) for line in (tmp_path / "completions" / "eval-000000.jsonl").read_text().splitlines()]
    assert [row["prompt_index"] for row in written] == [0, 1, 2, 3]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final_eval"]["eval/exact_match"] == 1


def test_evaluation_is_reproducible_and_does_not_change_training(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path / "a", max_steps=4, generation={"temperature": 1.0})
    first, second = trainer.evaluate(), trainer.evaluate()
    assert {**first, "eval/time": 0} == {**second, "eval/time": 0}
    trainer.train()
    plain = make_trainer(tiny_model_path, tmp_path / "b", max_steps=4)
    plain.args.eval_generation = None
    plain.eval_rows = None
    plain.train()
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (trainer, plain)]
    assert losses[0] == losses[1]


def test_a_configured_eos_token_stops_generation(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, eos_token="<|endoftext|>")
    generation = instance_of(EvalRows, trainer.eval_rows).generation
    stop_ids = generation.requests[0].sampling.stop_token_ids
    assert stop_ids.count(trainer.processing_class.convert_tokens_to_ids("<|endoftext|>")) == 1
    assert trainer.processing_class.convert_tokens_to_ids("<|im_end|>") in stop_ids


def test_another_eval_set_uses_its_own_prompts(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, generation={"metrics": ["label"], "labels": ["yes", "no"]})
    assert trainer.evaluate()["eval/label/unparsable"] == 1
    trainer.evaluate([{"prompt": "other", "completion": "no"}])
    written = (tmp_path / "completions" / "eval-000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in written] == ["other"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"generation": {"metrics": ["bleu", "exactmatch"]}},
            ConfigError,
            "eval_generation.metrics.1: .*'exact_match'",
        ),
        ({"generation": {"reference": "gold"}}, DataError, "row 0: there is no right answer .* 'gold'"),
        ({"generation": {"max_tokens": 5000}}, ConfigError, "leaves no room for a prompt"),
        ({"eval_dataset": [{"text": "no prompt"}]}, DataError, "row 0: no prompt"),
        ({"metric_for_best_model": "bleu"}, ConfigError, "there are: .*eval/exact_match.*eval/rouge_l"),
    ],
)
def test_impossible_evaluations_are_refused_before_training(
    tiny_model_path: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(tiny_model_path, tmp_path, **options)


def test_generation_without_an_eval_set_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), eval_generation={"metrics": ["rouge"]})
    with pytest.raises(ConfigError, match="eval_generation needs rows to write for"):
        SFTTrainer(str(tiny_model_path), args, train_dataset=rows(4))
