"""Test what checkpoints hold, which are kept, which are refused on resume, and how signals stop a run."""

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlqwen import SFTConfig, SFTTrainer
from rlqwen.checkpoint import Retention, get_rng_state, read_state, set_rng_state, write_state
from rlqwen.checkpoint.atomic_folder import find_fault, write_complete
from rlqwen.checkpoint.fingerprint import (
    config_fingerprint,
    diff_fingerprints,
    digest_rows,
    flatten,
    reward_fingerprint,
)
from rlqwen.config import GRPOConfig, Recipe
from rlqwen.data import TokenizedRow
from rlqwen.data.cleaning.texts import Row
from rlqwen.errors import ConfigError, Preempted
from rlqwen.reporting import read_metrics
from rlqwen.rewards.registry import resolve
from rlqwen.runs.stages import plan_stages
from rlqwen.runs.verification import compare_runs
from rlqwen.stop_signals import ECHO_S
from rlqwen.trainers.factory import build_trainer

ROWS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}" * 3}]}
    for i in range(11)
]


def make(model: Path, folder: Path, rows: Sequence[Row] = ROWS, **options: Any) -> SFTTrainer:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "output_dir": str(folder)}
    return SFTTrainer(str(model), SFTConfig(**defaults | options), rows, options.pop("eval_dataset", None))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[Any]:
    """Use one thread, as in a forked child, so that sums are computed in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# The parts


def test_state_files_restore_values_and_tensors(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None, {"b": torch.arange(3)}], "c": torch.tensor(0.1), "d": {}, "e": float("nan")}
    write_state(tmp_path, "v", values)
    back = read_state(tmp_path, "v")
    assert back["a"][:3] == [1, 2.5, None]
    assert torch.equal(back["a"][3]["b"], torch.arange(3))
    assert torch.equal(back["c"], torch.tensor(0.1))
    assert back["e"] != back["e"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_rng_states_are_restored(tmp_path: Path) -> None:
    write_state(tmp_path, "random", get_rng_state())
    drawn = [random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(0, 1)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    set_rng_state(read_state(tmp_path, "random"))
    assert [random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(0, 1)] == drawn


def writing(name: str) -> Callable[[Path], None]:
    """Return a function that writes one file into a folder."""

    def write(folder: Path) -> None:
        (folder / name).write_text(f"text of {name}")

    return write


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "a").write_text("x")
        raise KeyError("not a storage error")

    with pytest.raises(KeyError):
        write_complete(tmp_path / "f", fail)
    assert not list(tmp_path.iterdir())
    write_complete(tmp_path / "f", writing("a"))
    write_complete(tmp_path / "f", writing("b"))
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["b", "manifest.json"]
    assert find_fault(tmp_path / "f") is None
    manifest = json.loads((tmp_path / "f" / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = manifest["files"]["b"]
    (tmp_path / "f" / "manifest.json").write_text(json.dumps(manifest))
    assert "outside" in str(find_fault(tmp_path / "f"))


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10, 12):
        (tmp_path / f"step-{step:06d}").mkdir()
    Retention(limit=None, keep_every=None).drop_old(tmp_path, best=None)
    assert len(list(tmp_path.iterdir())) == 6
    Retention(limit=2, keep_every=4).drop_old(tmp_path, best=tmp_path / "step-000002")
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [2, 4, 6, 8, 10, 12]
    Retention(limit=1, keep_every=4).drop_old(tmp_path, best=tmp_path / "step-000002")
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [2, 4, 8, 10, 12]


def test_a_setting_that_is_off_and_unknown_to_the_other_version_is_no_difference() -> None:
    off = {"train.rollout.routing_replay": False, "train.other": None}
    assert diff_fingerprints({}, off) == diff_fingerprints(off, {}) == []
    on = {"train.rollout.routing_replay": True, "train.rank": 0, "rewards.0.strict": False}
    assert len(diff_fingerprints({}, on)) == 3


def test_differences_are_listed_by_name() -> None:
    was = flatten({"lr": 1e-5, "lora": {"r": 8, "targets": {"b", "a"}}, "rewards": [{"name": "x"}]}, "train")
    assert was == {
        "train.lr": 1e-5, "train.lora.r": 8, "train.lora.targets": ["a", "b"], "train.rewards.0.name": "x"
    }  # fmt: skip
    now = {**was, "train.lr": 2e-5, "new": 1}
    del now["train.lora.r"]
    assert diff_fingerprints(was, now) == [
        "train.lr: was 1e-05, is 2e-05",
        "train.lora.r: was 8, is 'absent'",
        "new: was 'absent', is 1",
    ]


def test_settings_without_effect_on_the_result_are_not_in_the_fingerprint() -> None:
    was = config_fingerprint(GRPOConfig())
    changed = GRPOConfig(save_steps=5, watch="off", scoring={"timeout": 9}, rollout={"max_restarts": 9})
    assert config_fingerprint(changed) == was
    changed = GRPOConfig(learning_rate=1e-5, rollout={"num_workers": 2})
    assert diff_fingerprints(was, config_fingerprint(changed)) == [
        "train.learning_rate: was 1e-06, is 1e-05",
        "train.rollout.num_workers: was None, is 2",
    ]


def test_fields_marked_as_without_effect_are_those_that_only_steer_the_run() -> None:
    kept = {name.removeprefix("train.").partition(".")[0] for name in config_fingerprint(GRPOConfig())}
    assert set(GRPOConfig.model_fields) - kept == {
        *("output_dir", "overwrite_output_dir", "run_name", "report_to", "disable_tqdm", "logging_steps"),
        *("save_strategy", "save_steps", "save_minutes", "save_total_limit", "save_keep_every", "save_only_model"),
        *("resume_from_checkpoint", "resume_allow_changes", "dataset_num_proc", "model_init_kwargs", "use_cpu"),
        *("scoring", "watch"),
    }


def test_the_fingerprint_changes_with_the_source_of_a_reward() -> None:
    def first(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    def other(completions: list[str], **kwargs: Any) -> list[float]:
        return [2.0] * len(completions)

    ours, theirs = resolve(first), resolve(other)
    was, now = reward_fingerprint([ours]), reward_fingerprint([dataclasses.replace(theirs, name="first")])
    assert [line.partition(":")[0] for line in diff_fingerprints(was, now)] == ["reward.first.source"]
    assert reward_fingerprint([resolve("accuracy")])["reward.accuracy.origin"].startswith("rlqwen ")


def test_digests_depend_on_every_token_and_on_the_order() -> None:
    rows = [TokenizedRow([1, 2, 3], [False, True, True]), TokenizedRow([4], [True])]
    assert digest_rows(rows) == digest_rows([TokenizedRow([1, 2, 3], [False, True, True]), TokenizedRow([4], [True])])
    assert digest_rows(rows) != digest_rows(rows[::-1])
    assert digest_rows(rows) != digest_rows([TokenizedRow([1, 2, 3], [True, True, True]), TokenizedRow([4], [True])])
    assert digest_rows([[1, 2], [3]]) != digest_rows([[1], [2, 3]])


# Runs


def test_a_reward_whose_file_holds_another_text_has_no_source_in_the_fingerprint(tmp_path: Path) -> None:
    """As one defined in a cell or a script that was edited after it had been read."""
    file = tmp_path / "edited.md"
    file.write_text("def reward(completions, **kwargs):\n    return [(0.0\n")
    space: dict[str, Any] = {}
    exec(compile("def reward(completions, **kwargs):\n    return [0.0]\n", str(file), "exec"), space)  # noqa: S102
    assert reward_fingerprint([resolve(space["reward"])])["reward.reward.source"] is None


def test_a_checkpoint_loads_with_transformers_and_holds_a_fingerprint(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make(tiny_model_path, tmp_path, save_keep_every=3, save_steps=1, save_total_limit=1)
    trainer.train()
    assert names(tmp_path) == ["step-000003", "step-000004"]
    checkpoint = tmp_path / "checkpoints" / "step-000004"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    fingerprint = read_state(checkpoint, "fingerprint")
    names_of_entries = {"version.torch", "version.rlqwen", "model.weights", "data.train", "tokenizer", "world_size"}
    assert names_of_entries <= fingerprint.keys()
    assert fingerprint["train.learning_rate"] == 2e-5
    assert "train.output_dir" not in fingerprint


def test_save_only_model_writes_no_optimizer_and_cannot_be_resumed(tiny_model_path: Path, tmp_path: Path) -> None:
    make(tiny_model_path, tmp_path, save_only_model=True).train()
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    assert not list(checkpoint.glob("optimizer*"))
    assert AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ConfigError, match="holds the model alone"):
        make(tiny_model_path, tmp_path, resume_from_checkpoint=str(checkpoint)).train()


def test_save_minutes_saves_after_that_time(tiny_model_path: Path, tmp_path: Path) -> None:
    make(tiny_model_path, tmp_path / "often", save_strategy="no", save_minutes=1e-9).train()
    assert names(tmp_path / "often") == [f"step-{step:06d}" for step in (1, 2, 3, 4)]
    make(tiny_model_path, tmp_path / "seldom", save_strategy="no", save_minutes=60.0).train()
    assert not (tmp_path / "seldom" / "checkpoints").exists()


CHANGES: dict[str, Any] = {
    "train.learning_rate: was 2e-05, is 0.001": {"learning_rate": 1e-3},
    "train.max_steps: was 4, is 5": {"max_steps": 5},
    "data.train: was": {"rows": ROWS[1:]},
}


@pytest.mark.parametrize("line", CHANGES)
def test_changed_settings_are_refused_unless_allowed(tiny_model_path: Path, tmp_path: Path, line: str) -> None:
    make(tiny_model_path, tmp_path).train()
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=line) as caught:
        make(tiny_model_path, tmp_path, **CHANGES[line]).train(resume_from_checkpoint=True)
    assert "--allow-changes" in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    trainer = make(tiny_model_path, tmp_path, **CHANGES[line], resume_allow_changes=True)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-000002")
    assert trainer.state.global_step == CHANGES[line].get("max_steps", 4)
    assert json.loads((tmp_path / "summary.json").read_text())["resumed"][0]["step"] == 2


def test_another_model_tokenizer_world_size_and_version_are_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    make(tiny_model_path, tmp_path / "run").train()
    other = make(tiny_model_path, tmp_path / "run", resume_from_checkpoint=True)
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1e-3
    other.processing_class.chat_template += " "
    fingerprint = other.fingerprint()
    fingerprint["world_size"] = 2
    fingerprint["version.torch"] = "0.1"
    with pytest.raises(ConfigError) as caught:
        other.train()
    for part in ("model.weights: was", "tokenizer: was", "world_size: was 1, is 2", "version.torch: was"):
        assert part in str(caught.value)
    assert str(caught.value).count(": was ") == 4


def test_checkpoints_after_the_resumed_one_are_archived(tiny_model_path: Path, tmp_path: Path) -> None:
    make(tiny_model_path, tmp_path / "straight").train()
    make(tiny_model_path, tmp_path / "run").train()
    trainer = make(tiny_model_path, tmp_path / "run")
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "step-000002"))
    assert names(tmp_path / "run") == ["set-aside", "step-000002", "step-000004"]
    comparison = compare_runs(tmp_path / "straight", tmp_path / "run")
    assert comparison.is_exact, str(comparison)


def test_resume_auto_starts_a_new_run_if_there_is_no_checkpoint(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        make(tiny_model_path, tmp_path, resume_from_checkpoint=True).train()
    # Left by a run that was killed before its first checkpoint.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    make(tiny_model_path, tmp_path, resume_from_checkpoint="auto").train()
    assert read_metrics(tmp_path)[0]["loss"]
    trainer = make(tiny_model_path, tmp_path, resume_from_checkpoint="auto")
    assert trainer.train().global_step == 4
    assert json.loads((tmp_path / "summary.json").read_text())["resumed"][0]["step"] == 4


class SendOnce(TrainerCallback):
    """Send signals to this process in the middle of update 3; a signal that comes again, only once it is no echo."""

    def __init__(self, *signals: int) -> None:
        self.signals = signals

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 2:
            for place, number in enumerate(self.signals):
                if number in self.signals[:place]:
                    time.sleep(ECHO_S)
                os.kill(os.getpid(), number)


@pytest.fixture
def ctrl_c(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Install Python's SIGINT handler, which is absent if a shell runs the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGTERM, "SIGTERM", 75),
        (signal.SIGUSR1, "SIGUSR1", 75),
        (signal.SIGHUP, "SIGHUP", 75),
        (signal.SIGINT, "Ctrl-C", 130),
    ],
)
def test_a_signal_saves_and_ends_with_the_exit_code_for_a_retry(
    tiny_model_path: Path, tmp_path: Path, ctrl_c: Any, number: int, name: str, code: int
) -> None:
    before = signal.getsignal(number)
    make(tiny_model_path, tmp_path / "straight", save_steps=100).train()
    trainer = make(tiny_model_path, tmp_path / "run", save_steps=100)
    trainer.callbacks.append(SendOnce(number))
    with pytest.raises(Preempted, match=rf"{name}: saved after update 3; go on with train\(resume_from") as caught:
        trainer.train()
    assert caught.value.exit_code == code
    assert isinstance(caught.value, KeyboardInterrupt) == (number == signal.SIGINT)
    assert signal.getsignal(number) == before
    make(tiny_model_path, tmp_path / "run", save_steps=100).train(resume_from_checkpoint=True)
    comparison = compare_runs(tmp_path / "straight", tmp_path / "run")
    assert comparison.is_exact, str(comparison)


def test_a_second_sigterm_ends_the_process_at_once(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make(tiny_model_path, tmp_path / "run")
    trainer.callbacks.append(SendOnce(signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143
    assert names(tmp_path / "run") == ["step-000002"]


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_ctrl_c_ends_training_at_once(
    tiny_model_path: Path, tmp_path: Path, ctrl_c: Any, first: int, second: int
) -> None:
    trainer = make(tiny_model_path, tmp_path / "run", save_steps=100)
    trainer.callbacks.append(SendOnce(first, second))
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert type(caught.value) is KeyboardInterrupt
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ctrl_c_right_after_a_checkpoint_ends_training_at_once(
    tiny_model_path: Path, tmp_path: Path, ctrl_c: Any
) -> None:
    trainer = make(tiny_model_path, tmp_path / "run")  # it saves after update 2, and the signal comes right then
    trainer.callbacks.append(SendOnce(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert type(caught.value) is KeyboardInterrupt
    assert names(tmp_path / "run") == ["step-000002"]


def test_the_same_trainer_resumes_after_ctrl_c(tiny_model_path: Path, tmp_path: Path, ctrl_c: Any) -> None:
    trainer = make(tiny_model_path, tmp_path / "run", save_steps=100)
    trainer.callbacks.append(SendOnce(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.train(resume_from_checkpoint=True).global_step == 4


def test_a_signal_before_training_is_not_forgotten(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make(tiny_model_path, tmp_path / "run", save_steps=100)
    trainer.preemption.listen()  # as an evaluation that starts Ray does
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM: saved after update 1"):
        trainer.train()
    assert trainer.train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.fault("SIGTERM or Ctrl-C twice within milliseconds, in training", "one request to stop: all is saved")
def test_an_echo_of_a_signal_still_saves(
    tiny_model_path: Path, tmp_path: Path, ctrl_c: Any, number: int, code: int
) -> None:
    trainer = make(tiny_model_path, tmp_path / "run", save_steps=100)
    trainer.callbacks += [SendOnce(number), SendOnce(number)]
    with pytest.raises(Preempted, match="saved after update 3") as caught:
        trainer.train()
    assert caught.value.exit_code == code


def test_sighup_twice_still_saves(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make(tiny_model_path, tmp_path / "run")
    trainer.callbacks.append(SendOnce(signal.SIGHUP, signal.SIGHUP))
    with pytest.raises(Preempted, match="SIGHUP: saved after update 3"):
        trainer.train()


def test_a_signal_that_is_ignored_stays_ignored(tiny_model_path: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        trainer = make(tiny_model_path, tmp_path / "run")
        trainer.callbacks.append(SendOnce(signal.SIGHUP))
        assert trainer.train().global_step == 4
    finally:
        signal.signal(signal.SIGHUP, before)


# Pipelines


def recipe(folder: Path, **more: Any) -> Recipe:
    return Recipe.parse(
        {
            "algorithm": "sft",
            "model": {"path": "builtin:tiny-qwen3"},
            "data": {"train": {"path": "rows.jsonl"}},
            "output_dir": str(folder),
        }
        | more
    )


def test_resuming_a_pipeline_skips_finished_stages(tmp_path: Path) -> None:
    recipes = [recipe(tmp_path / name) for name in ("first", "second", "third")]
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        plan_stages(recipes, resume=True)
    (tmp_path / "first" / "final").mkdir(parents=True)
    (tmp_path / "first" / "summary.json").write_text('{"steps": 1}')
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="ended before its first checkpoint"):
        plan_stages(recipes, resume=True)
    (tmp_path / "second" / "checkpoints").mkdir()
    stages = plan_stages(recipes, resume=True, allow_changes=True)
    assert [stage.finished for stage in stages] == [True, False, False]
    assert [stage.recipe.train.resume_from_checkpoint for stage in stages] == [None, True, None]
    assert stages[1].recipe.train.resume_allow_changes
    assert not any(stage.finished for stage in plan_stages(recipes))


def test_resume_auto_in_a_recipe_reuses_its_folder(tmp_path: Path) -> None:
    (stage,) = plan_stages([recipe(tmp_path / "run", resume="auto")])
    assert stage.recipe.train.resume_from_checkpoint == "auto"
    assert stage.recipe.reuses_folder
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "summary.json").write_text("{")  # truncated, so the stage is not finished
    assert not plan_stages([recipe(tmp_path / "run", resume="auto")])[0].finished


def test_the_fingerprint_holds_the_arguments_of_rewards(tiny_model_path: Path, tmp_path: Path) -> None:
    def fingerprint(budget: int) -> dict[str, Any]:
        trainer = build_trainer(
            Recipe.parse(
                {
                    "algorithm": "grpo",
                    "model": {"path": str(tiny_model_path)},
                    "data": {"train": {"generator": "arithmetic", "args": {"kind": "prompts", "size": 8}}},
                    "rewards": [{"name": "length", "args": {"budget": budget}}],
                    "rollout": {"engine": "transformers"},
                    "output_dir": str(tmp_path / str(budget)),
                }
            )
        )
        try:
            return trainer.fingerprint()
        finally:
            trainer.close()

    assert diff_fingerprints(fingerprint(6), fingerprint(7)) == ["rewards.0.args.budget: was 6, is 7"]
