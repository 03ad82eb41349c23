"""Test what is planned of a run: its batch, the layout that `--best` finds, and the cheapest change that fits."""

import time
from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import Recipe
from rlqwen.config.recipe_yaml import list_recipes, load_recipe
from rlqwen.errors import ConfigError, ModelError
from rlqwen.planning.cheapest_change import cheapest_change
from rlqwen.planning.gpus import Cluster
from rlqwen.planning.layout_search import NEARLY, all_plans, find_best, layouts
from rlqwen.planning.made_plan import make_plan
from rlqwen.planning.plan_target import read_target
from rlqwen.planning.published_models import CONFIGS, published_names
from rlqwen.planning.run_plan import RunPlanner
from rlqwen.planning.step_time import NODE_LATENCY
from rlqwen.planning.workload import Workload
from rlqwen.preflight import check_recipe
from rlqwen.preflight.parallel_layout import ParallelLayout
from tests.planning.models import size_of


def planner_of(name: str, gpus: str, *overrides: str, mean: float | None = None) -> RunPlanner:
    recipe, cluster = read_target(f"Qwen/{name}", [*_engine(overrides), *overrides]), Cluster.parse(gpus)
    size, layout = size_of(name), ParallelLayout(fsdp=RunPlanner.train_ranks(recipe, cluster))
    return RunPlanner(recipe, size, cluster, Workload.of(recipe, size.facts.context, layout, mean=mean))


def _engine(overrides: Any) -> list[str]:
    """Return the override that needs no vLLM, if the recipe samples."""
    return ["rollout.engine=transformers"] if "algorithm=grpo" in overrides else []


def test_the_batch_is_that_of_the_recipe_whatever_the_layout() -> None:
    planner = planner_of("Qwen3-30B-A3B", "16xH100")
    assert (planner.work.sequences, planner.work.tokens) == (64, 64 * 4096)
    for layout in layouts(planner):
        plan = planner.plan(layout)
        assert plan.work is planner.work
        assert plan.micro_batches * layout.data_ranks == 64  # one row each
    steps = Workload.of(planner.recipe, 40_960, ParallelLayout(fsdp=16), num_rows=6400).num_steps
    assert steps == 300  # three epochs of 6,400 rows


def test_grpo_samples_its_completions_before_it_trains() -> None:
    planner = planner_of("Qwen3-8B", "8xH100", "algorithm=grpo", mean=1000)
    work = planner.work
    assert (work.completions_per_step, work.updates_per_step) == (256, 1)
    assert work.tokens == 256 * 1000 + 32 * 512
    plan = planner.plan(ParallelLayout(fsdp=8))
    assert plan.rollout is not None
    assert plan.step_seconds == pytest.approx(plan.rollout.total + plan.sync + plan.update.total)
    assert 0 < plan.rollout_share < 1
    assert plan.gpu_hours is None


def test_engines_on_gpus_of_their_own_sample_while_the_policy_trains() -> None:
    pytest.importorskip("vllm")
    separate = ["rollout.engine=vllm", "rollout.placement=separate", "rollout.max_staleness=1", "train.max_steps=100"]
    ahead = planner_of("Qwen3-8B", "16xH100", "algorithm=grpo", *separate, mean=1000)
    assert (ahead.train_gpus, ahead.rollout_gpus) == (8, 8)
    overlapping = ahead.plan(ParallelLayout(fsdp=8))
    assert overlapping.rollout is not None
    longer = max(overlapping.rollout.total, overlapping.train_seconds)
    assert overlapping.step_seconds == pytest.approx(longer + overlapping.sync)
    assert overlapping.gpu_hours == pytest.approx(100 * overlapping.step_seconds * 16 / 3600)


@pytest.mark.parametrize(
    ("name", "gpus", "words"),
    [
        ("Qwen3-235B-A22B", "1024xH100", []),
        ("Qwen3.5-397B-A17B", "1024xH200", ["algorithm=grpo"]),
        ("Qwen2.5-72B", "64xH100", []),
    ],
)
def test_the_best_layout_is_found_among_all_that_divide_the_model(name: str, gpus: str, words: list[str]) -> None:
    planner = planner_of(name, gpus, *words)
    started = time.process_time()
    best = find_best(planner)
    assert time.process_time() - started < 2  # 0.2 to 0.5 s on one core
    plans = list(all_plans(planner))
    assert best is not None
    assert best.fits
    assert all(plan.layout.num_ranks == planner.cluster.count for plan in plans)
    assert all(not plan.layout.faults(size_of(name).text_config) for plan in plans)
    assert best.step_seconds <= NEARLY * min(plan.step_seconds for plan in plans if plan.fits)


def test_more_gpus_make_updates_faster_and_not_cheaper() -> None:
    hours = []
    for count in (8, 16, 64, 256):
        best = find_best(planner_of("Qwen3-8B", f"{count}xH100", f"train.gradient_accumulation_steps={256 // count}"))
        assert best is not None
        hours.append((best.step_seconds, best.step_seconds * count))
    assert [step for step, _ in hours] == sorted((step for step, _ in hours), reverse=True)
    assert hours[-1][1] > 0.95 * hours[0][1]


def test_models_of_every_family_are_planned_on_1024_gpus() -> None:
    for name in ("Qwen2.5-0.5B", "Qwen3-Next-80B-A3B", "Qwen3.5-9B", "Qwen3.8-2.4T-A95B"):
        assert name in published_names()
        planner = planner_of(name, "1024xH200")
        assert find_best(planner) is not None, name


@pytest.mark.parametrize(
    ("name", "gpus", "said"),
    [
        ("Qwen3-4B", "1xH100", "train.gradient_checkpointing=true"),
        ("Qwen2.5-72B", "8xH100", "--gpus 24xH100-80G parallel.engine=fsdp2"),
        ("Qwen3-8B", "1xRTX4090", "--gpus 8xRTX4090-24G parallel.engine=fsdp2"),
    ],
)
def test_the_cheapest_change_fits(name: str, gpus: str, said: str) -> None:
    settings = [] if name != "Qwen3-4B" else ["train.gradient_checkpointing=false", "train.max_length=16384"]
    planner = planner_of(name, gpus, *settings)
    plan = planner.plan(ParallelLayout(fsdp=planner.cluster.count))
    assert not plan.fits
    change = cheapest_change(planner, plan)
    assert change is not None
    assert change.words.startswith(said)
    assert change.plan.fits


def test_an_adapter_is_proposed_where_nothing_else_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlqwen.planning.cheapest_change.MOST_GPUS", 1)
    planner = planner_of("Qwen3-8B", "1xRTX4090")
    change = cheapest_change(planner, planner.plan(ParallelLayout()))
    assert change is not None
    assert change.words.startswith("model.lora='{r: 16}'")
    assert change.plan.fits
    assert change.plan.recipe.model.lora is not None


def test_models_and_recipes_are_read(tmp_path: Path) -> None:
    assert read_target("quickstart_sft").algorithm == "sft"
    recipe = read_target("Qwen/Qwen3-8B", ["train.max_length=8192", "model.lora={r: 8}"])
    assert isinstance(recipe, Recipe)
    assert (recipe.model.path, recipe.model.lora and recipe.model.lora.r) == ("Qwen/Qwen3-8B", 8)
    with pytest.raises(ConfigError, match="algorithm='dpo': a model alone is planned for sft or grpo"):
        read_target("Qwen/Qwen3-8B", ["algorithm=dpo"])
    with pytest.raises(ModelError, match="did you mean Qwen/Qwen3-8B"):
        make_plan("Qwen/Qwen3-8C", gpus="8xH100")
    with pytest.raises(ModelError, match="there is no such folder"):
        make_plan(str(tmp_path / "nothing"), gpus="8xH100")


def test_rows_of_the_data_give_the_length_of_the_run() -> None:
    made = make_plan("quickstart_sft", gpus="1xH100")
    assert made.plan.work.num_steps
    assert made.plan.gpu_hours
    assert make_plan("Qwen/Qwen3-0.6B", gpus="1xH100").plan.gpu_hours is None
    known = make_plan("Qwen/Qwen3-0.6B", gpus="1xH100", num_rows=4000)
    assert known.plan.work.num_steps == 3000


@pytest.mark.parametrize("recipe", [each.name for each in list_recipes() if "quickstart" not in each.name])
def test_every_recipe_for_gpus_is_planned(recipe: str) -> None:
    algorithm = recipe.partition("_")[0]
    settings = ["rollout.engine=transformers"] if algorithm in ("grpo", "ppo", "distillation") else []
    made = make_plan(recipe, settings, gpus="64xH200", num_rows=1000)
    assert made.plan.fits or made.change is not None
    assert 0 < made.plan.step_seconds < 3600
    parts = made.plan.memory.parts
    assert ("teacher" in parts) == (algorithm == "distillation")


def test_check_and_plan_compute_the_same_memory(tmp_path: Path) -> None:
    config = CONFIGS / "Qwen3-8B.json"
    (tmp_path / "config.json").write_text(config.read_text())
    settings = [f"model.path={tmp_path}", "parallel.zero_stage=3", "train.max_length=2048"]
    settings.append("data.train.path=builtin:questions")
    recipe = load_recipe("sft_gsm8k_qwen3_0.6b", settings)
    report = check_recipe(recipe, gpu_gib=80.0, num_ranks=8)
    made = make_plan("sft_gsm8k_qwen3_0.6b", settings, gpus="8xA100-80G", num_rows=1000)
    assert str(made.plan.layout) == "engine=deepspeed,zero=3,fsdp=8"
    (checked,), (planned,) = report.figures, made.report().figures
    assert checked.columns[1:] == planned.columns[1:]
    assert checked.rows == planned.rows


def test_a_gather_over_many_nodes_takes_longer_than_its_bytes() -> None:
    seconds = []
    for count in (64, 1024):
        planner = planner_of("Qwen3-0.6B", f"{count}xH100", "train.gradient_accumulation_steps=1")
        seconds.append(planner.plan(ParallelLayout(fsdp=count)).update.parts.get("weights and gradients", 0.0))
    # Each rank has as many tokens; a gather passes 128 nodes instead of 8, and no longer hides behind computing.
    waiting = 3 * 28 * NODE_LATENCY * 128
    assert seconds[0] < 0.01 < 0.5 * waiting < seconds[1]
