"""Test what checks find without a device."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from rlqwen.config import GRPOConfig, Recipe, RolloutConfig, SFTConfig
from rlqwen.config.recipe_yaml import PackagedRecipe, list_recipes, load_recipe, load_recipes
from rlqwen.errors import ConfigError, DataError, ModelError, ResourceError, RewardSpecError
from rlqwen.preflight import (
    check_before_run,
    check_model_path,
    check_pipeline,
    check_recipe,
    check_resources,
    plan_batch,
    prompt_room,
)
from rlqwen.preflight.check_report import CheckReport
from tests.narrowing import only_source

STAND_INS = {
    "openai/gsm8k": "builtin:questions",
    "llamafactory/alpaca_zh": "builtin:instructions_zh",
    "trl-lib/ultrafeedback_binarized": "builtin:pairs",
}
"""Hub datasets of the recipes -> rows of the same columns that come with rlqwen."""
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def recipe_of(model: Path | str, rows: list[dict[str, Any]], folder: Path, **changes: Any) -> Recipe:
    """Make a recipe over rows that are written to a file; `changes` replace its top-level sections."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "algorithm": "sft",
        "model": {"path": str(model)},
        "data": {"train": {"path": str(path)}},
        "train": {"per_device_train_batch_size": 2},
        "output_dir": str(folder / "run"),
    }
    return Recipe.parse(values | changes)


GRPO = {"algorithm": "grpo", "rewards": ["accuracy"], "train": {"max_completion_length": 8}}
SUM = {"prompt": "1 + 1 = ?", "solution": "2"}
CHAT = {"messages": [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": "2"}]}


def the_fault(report: CheckReport) -> Exception:
    assert len(report.faults) == 1, report.faults
    return report.faults[0]


# Arithmetic


def test_the_grpo_batch_plan_is_one_line_from_prompts_to_updates() -> None:
    plan = plan_batch(
        GRPOConfig(
            per_device_train_batch_size=16, gradient_accumulation_steps=2, generation_batch_size=64, num_iterations=2
        ),
        num_rows=20,
    )
    # 64 completions = 8 prompts x 8; two updates of 32 each, twice over; ceil(3 x 20 / 8) = 8 rollouts
    assert (plan.rows_per_step, plan.updates_per_step, plan.total_updates) == (8, 4, 32)
    assert plan.text == (
        "8 prompts x 8 generations = 64 completions per rollout = 2 x 32 = 16 per micro-batch x 2 accumulated x 1 rank; "
        "4 updates per rollout (2 passes); 32 updates in all = 3.2 epochs"
    )


def test_ranks_multiply_the_update() -> None:
    plan = plan_batch(GRPOConfig(per_device_train_batch_size=8, num_iterations=2, max_steps=4), 20, num_ranks=3)
    assert (plan.rows_per_step, plan.updates_per_step, plan.completions_per_update) == (3, 2, 24)
    assert plan.text.startswith(
        "3 prompts x 8 generations = 24 completions per rollout = 8 per micro-batch x 1 accumulated x 3 ranks; 2 updates"
    )
    plan = plan_batch(GRPOConfig(per_device_train_batch_size=8, generation_batch_size=48), 20, num_ranks=3)
    assert (plan.rows_per_step, plan.updates_per_step) == (6, 2)  # given in all, not for each rank
    plan = plan_batch(SFTConfig(per_device_train_batch_size=4, max_steps=5), 10, num_ranks=2)
    assert plan.rows_per_step == plan.completions_per_update == 8
    assert plan.text.startswith("8 sequences per update = 4 per micro-batch x 1 accumulated x 2 ranks")


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused() -> None:
    config = GRPOConfig(per_device_train_batch_size=8, generation_batch_size=16)
    with pytest.raises(ConfigError, match=r"16 completions per rollout do not divide into updates of 24 .* x 3 ranks"):
        plan_batch(config, 20, num_ranks=3)
    with pytest.raises(ConfigError, match="4 completions per rollout"):
        plan_batch(GRPOConfig(per_device_train_batch_size=4), 20)
    assert plan_batch(GRPOConfig(per_device_train_batch_size=4), 20, num_ranks=2).rows_per_step == 1


def test_what_is_valid_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def outcomes() -> list[object]:
        grpo = GRPOConfig(per_device_train_batch_size=4)
        whole = SFTConfig.model_validate({"deepspeed": {"train_batch_size": 16}, "per_device_train_batch_size": 2})
        return [grpo, whole, whole.for_ranks(2).gradient_accumulation_steps, plan_batch(whole, 32, 4).text]

    before = outcomes()
    for ranks in ("2", "3", "1000", "none"):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        assert outcomes() == before
    assert before[2] == 4
    assert "2 per micro-batch x 2 accumulated x 4 ranks" in str(before[3])


def test_a_check_plans_for_the_ranks_that_it_is_given(tiny_model_path: Path, tmp_path: Path) -> None:
    train = {"max_completion_length": 8, "per_device_train_batch_size": 4, "num_generations": 8}
    recipe = recipe_of(tiny_model_path, [SUM] * 4, tmp_path, **GRPO | {"train": train})
    assert "4 completions per rollout" in str(the_fault(check_recipe(recipe)))
    report = check_recipe(recipe, num_ranks=2)
    assert report.faults == []
    assert "1 prompt x 8 generations" in dict(report.facts)["batch"]


def test_the_sft_batch_plan_counts_sequences_and_applies_max_steps() -> None:
    plan = plan_batch(SFTConfig(per_device_train_batch_size=4, max_steps=5), num_rows=10)
    assert (plan.rows_per_step, plan.updates_per_step, plan.total_updates) == (4, 1, 5)
    assert plan.text == (
        "4 sequences per update = 4 per micro-batch x 1 accumulated x 1 rank; 5 updates in all = 2 epochs"
    )
    assert plan_batch(SFTConfig(per_device_train_batch_size=4), num_rows=10).total_updates == 8  # ceil(3 x 10 / 4)


def test_prompt_and_completion_must_fit_the_context() -> None:
    assert prompt_room(100, GRPOConfig(max_completion_length=60)) == 40
    assert prompt_room(100, GRPOConfig(max_completion_length=60, max_prompt_length=30)) == 30
    with pytest.raises(ConfigError, match="leaves no room for a prompt: the model's context is 100 tokens"):
        prompt_room(100, GRPOConfig(max_completion_length=100))
    with pytest.raises(ConfigError, match=r"leaves 10 tokens .* to the completion.* max_prompt_length=40 fits"):
        prompt_room(100, GRPOConfig(max_completion_length=60, max_prompt_length=90))


# Model


def test_a_complete_folder_a_builtin_and_a_hub_id_pass(tiny_model_path: Path) -> None:
    for path in (str(tiny_model_path), "builtin:tiny-qwen3", "Qwen/Qwen3-0.6B", "gpt2"):
        check_model_path(path)


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("model.safetensors", "weights (model.safetensors)"),
        ("config.json", "config.json"),
        ("tokenizer.json", "a tokenizer (tokenizer.json)"),
    ],
)
def test_a_folder_that_lacks_something_says_what(
    tiny_model_path: Path, tmp_path: Path, removed: str, named: str
) -> None:
    for file in tiny_model_path.iterdir():
        if file.name != removed:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ModelError) as caught:
        check_model_path(str(tmp_path))
    assert f"lacks {named}; it holds" in str(caught.value)


def test_a_missing_shard_an_adapter_alone_and_a_file_are_named(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ModelError, match="holds an adapter without its base model"):
        check_model_path(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(tiny_model_path / name)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors; it holds"):
        check_model_path(str(tmp_path))
    with pytest.raises(ModelError, match="is a file"):
        check_model_path(str(tmp_path / "config.json"))


def test_a_mistyped_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "final").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such folder; did you mean 'runs/final'\?"):
        check_model_path("runs/finale")
    with pytest.raises(ModelError, match="nor is there 'nowhere/near'"):
        check_model_path("nowhere/near/final")


def test_an_unknown_hub_id_is_refused_but_only_warned_about_if_the_hub_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("nobody/nothing-of-that-name", [CHAT], tmp_path)
    report = check_recipe(recipe)
    assert report.faults == []
    assert "the hub cannot be reached" in report.warnings[0]
    assert dict(report.facts)["data.train"] == "1 rows"

    def unknown(*_: object, **__: object) -> None:
        request = httpx2.Request("GET", "https://hub.invalid")
        raise RepositoryNotFoundError("404", response=httpx2.Response(404, request=request))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unknown)
    assert "and the hub has none that you may read" in str(the_fault(check_recipe(recipe)))


# Resources


@needs_vllm
def test_more_cpus_or_gpus_than_the_machine_has_are_refused_with_the_numbers() -> None:
    with pytest.raises(ResourceError, match=r"3 workers x 5000 CPUs = 15000 CPUs, but there are"):
        check_resources(RolloutConfig(num_workers=3, num_cpus_per_worker=5000))
    with pytest.raises(ResourceError, match=r"2 workers x 500 GPUs = 1000 GPUs, but there are"):
        check_resources(RolloutConfig(num_workers=2, num_gpus_per_worker=500))


@needs_vllm
def test_resources_that_fit_are_reported_in_one_line() -> None:
    small = RolloutConfig(num_cpus_per_worker=0.5, num_gpus_per_worker=0)
    assert check_resources(small) == "1 vLLM worker x 0.5 CPUs, 1 GiB of KV cache"
    assert "cluster at ray://x" in check_resources(RolloutConfig(num_workers=99, ray_address="ray://x"))


def test_the_transformers_engine_asks_for_nothing() -> None:
    assert check_resources(RolloutConfig(engine="transformers", num_workers=99)).startswith("transformers")


# Whole recipes


def test_a_correct_sft_recipe_reports_model_data_template_and_batch(tiny_model_path: Path, tmp_path: Path) -> None:
    report = check_recipe(recipe_of(tiny_model_path, [CHAT] * 3, tmp_path))
    assert report.faults == []
    facts = dict(report.facts)
    assert list(facts) == [
        "model", "parameters", "trained", "data.train", "template", "data.train form", "batch", "memory"
    ]  # fmt: skip
    assert facts["data.train"].startswith("3 of 3 rows")
    assert "EOS in the loss of 100%" in facts["data.train"]
    assert "<|im_end|>" in facts["template"]
    assert "5 updates in all" in facts["batch"]  # ceil(3 epochs x 3 rows / 2)


def test_a_correct_grpo_recipe_reports_rewards_with_their_origin(tiny_model_path: Path, tmp_path: Path) -> None:
    report = check_recipe(recipe_of(tiny_model_path, [SUM] * 4, tmp_path, **GRPO))
    assert report.faults == []
    facts = dict(report.facts)
    assert facts["rewards"].startswith("accuracy x 1 (rlqwen ")
    assert facts["batch"].startswith("1 prompt x 8 generations = 8 completions")
    assert set(facts) == {
        "model", "parameters", "trained", "memory", "rewards", "data.train", "template", "thinking", "batch", "rollout"
    }  # fmt: skip


def test_routing_replay_in_a_dense_model_is_a_fault(tiny_model_path: Path, tmp_path: Path) -> None:
    for model, is_dense in ((tiny_model_path, True), ("builtin:tiny-qwen3-moe", False)):
        recipe = recipe_of(model, [SUM] * 4, tmp_path, **GRPO, rollout={"routing_replay": True})
        faults = [str(fault) for fault in check_recipe(recipe).faults if "routing_replay" in str(fault)]
        assert bool(faults) == is_dense, faults


def test_a_reward_that_needs_isolation_on_a_machine_without_it_is_a_fault(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlqwen.preflight.reward_check.unavailable_reason", lambda: "no Landlock")
    for isolation, num_faults in (("required", 1), ("off", 0)):
        scoring = {"isolated": ["accuracy"], "isolation": isolation}
        report = check_recipe(recipe_of(tiny_model_path, [SUM] * 4, tmp_path, **GRPO | {"scoring": scoring}))
        assert ["'accuracy' must run isolated" in str(fault) for fault in report.faults] == [True] * num_faults


def test_all_faults_are_collected_at_once(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, [{"prompt": "hi"}], tmp_path, **GRPO | {"rewards": ["accuracy", "acuracy"]})
    report = check_recipe(recipe)
    assert [type(fault) for fault in report.faults] == [ModelError, RewardSpecError]
    assert "did you mean 'accuracy'?" in str(report.faults[1])


def test_a_column_that_a_reward_needs_must_be_in_some_row(tiny_model_path: Path, tmp_path: Path) -> None:
    report = check_recipe(recipe_of(tiny_model_path, [{"prompt": "2 + 2 = ?"}] * 2, tmp_path, **GRPO))
    assert "needs a column 'solution' or 'answer', which data.train lacks" in str(the_fault(report))
    report = check_recipe(recipe_of(tiny_model_path, [{"prompt": "2 + 2 = ?"}, SUM, SUM], tmp_path, **GRPO))
    assert not report.faults
    (line,) = [warning for warning in report.warnings if "None" in warning]
    assert "reward 'accuracy' is given None in 1 of 3 rows of data.train, which have no 'solution' and no" in line


def test_empty_loss_masks_are_a_fault(tiny_model_path: Path, tmp_path: Path) -> None:
    report = check_recipe(recipe_of(tiny_model_path, [{"messages": CHAT["messages"][:1]}] * 2, tmp_path))
    assert "no token in the loss" in str(the_fault(report))


def test_an_end_of_turn_that_is_always_cut_off_is_a_fault(tiny_model_path: Path, tmp_path: Path) -> None:
    long = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "2 " * 50}]}
    recipe = recipe_of(tiny_model_path, [long], tmp_path, train={"max_length": 30})
    fault = the_fault(check_recipe(recipe))
    assert isinstance(fault, DataError)
    assert "would never learn to stop; 1 of 1 rows are cut at train.max_length=30" in str(fault)


def test_data_faults_name_file_and_line(tiny_model_path: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model_path, [CHAT], tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHAT) + "\n{broken\n")
    assert "line 2" in str(the_fault(check_recipe(recipe)))
    (tmp_path / "rows.jsonl").write_text("")
    assert "holds no rows" in str(the_fault(check_recipe(recipe)))


def test_evaluation_without_data_is_a_fault(tiny_model_path: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model_path, [CHAT], tmp_path, train={"eval_strategy": "epoch"})
    assert "there is no data.eval" in str(the_fault(check_recipe(recipe)))


def test_a_step_larger_than_the_data_is_a_warning(tiny_model_path: Path, tmp_path: Path) -> None:
    report = check_recipe(recipe_of(tiny_model_path, [CHAT], tmp_path))
    assert report.warnings == ["one step takes 2 rows and there are 1: rows repeat within it"]


def test_a_used_run_folder_is_a_fault(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    (report,) = check_pipeline([recipe_of(tiny_model_path, [CHAT], tmp_path)])
    assert "holds a run already" in str(the_fault(report))


def test_a_later_stage_is_checked_with_the_model_that_it_will_continue_from(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    first = recipe_of(tiny_model_path, [CHAT], tmp_path, output_dir=str(tmp_path / "a"))
    second = recipe_of(tmp_path / "a" / "final", [CHAT], tmp_path, output_dir=str(tmp_path / "b"))
    reports = check_pipeline([first, second])
    assert [report.faults for report in reports] == [[], []]
    assert f"to be trained from {tiny_model_path}" in dict(reports[1].facts)["model"]
    assert isinstance(the_fault(check_pipeline([second])[0]), ModelError)


def test_faults_of_a_later_stage_are_found_before_the_first_is_trained(tiny_model_path: Path, tmp_path: Path) -> None:
    first = recipe_of(tiny_model_path, [CHAT], tmp_path, output_dir=str(tmp_path / "a"))
    second = recipe_of(tiny_model_path, [{"prompt": "hi"}], tmp_path, **GRPO)
    with pytest.raises(RewardSpecError, match="needs a column 'solution'"):
        check_before_run([first, second])
    missing = recipe_of(tmp_path / "nowhere", [SUM], tmp_path, **GRPO)
    with pytest.raises(ModelError, match="there is no such folder"):
        check_before_run([first, missing])
    check_before_run([first, recipe_of(tiny_model_path, [SUM], tmp_path, **GRPO)])


BEFORE = dict.fromkeys(
    ("quickstart_grpo", "quickstart_ppo", "quickstart_dpo", "quickstart_reward"), ("quickstart_sft",)
) | {
    "quickstart_ppo_reward": ("quickstart_sft", "quickstart_reward"),
    "quickstart_distillation": ("quickstart_sft", "quickstart_grpo", "quickstart_student"),
}
"""Recipes that go on from what others leave."""


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_every_shipped_recipe_passes(recipe: PackagedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe(recipe.name)
    source = only_source(loaded.data.train)
    if source.path is not None:
        source.path = STAND_INS[source.path]
    monkeypatch.chdir(tmp_path)
    before = load_recipes(BEFORE.get(recipe.name, ()))
    assert check_pipeline([*before, loaded])[-1].faults == []
