"""Test the memory table of `rlqwen check`, its refusals, and the figures in the heads of the recipes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlqwen.cli import main
from rlqwen.config import Recipe
from rlqwen.config.recipe_yaml import load_recipe
from rlqwen.errors import ResourceError
from rlqwen.preflight import check_before_run, check_recipe
from rlqwen.preflight.memory_plan import (
    BACKWARD,
    CONTEXT_BYTES,
    ENGINE_WORKSPACE,
    GIB,
    LOAD,
    SAMPLING,
    STEP,
    SYNC,
    USABLE,
    MemoryPlan,
)
from rlqwen.preflight.memory_planner import plan_memory
from rlqwen.preflight.model_check import read_config
from rlqwen.preflight.model_size import ModelSize
from tests.preflight.test_model_check import SHIPPED, folder_of

RECIPES = Path(__file__).parents[2] / "recipes"


def local(path: str, folder: Path) -> str:
    """Return a folder with the config of a published model."""
    name = path.removeprefix("Qwen/").removesuffix("-Base").removesuffix("-Instruct")
    return str(folder / name if (folder / name).is_dir() else folder_of(name, folder / name, tokenizer=False))


def planned(recipe: Recipe, folder: Path, **options: Any) -> MemoryPlan:
    recipe.model.path = local(recipe.model.path, folder)
    if teacher := getattr(recipe.train, "teacher", None):
        recipe.train.teacher = local(teacher, folder)  # type: ignore[attr-defined]
    facts = read_config(recipe.model, folder)
    assert facts is not None
    return plan_memory(recipe, ModelSize.measure(recipe, facts), **options)


def sft(folder: Path, *, train: Any = None, model: Any = None, **changes: Any) -> Recipe:
    values = {
        "algorithm": "sft",
        "model": {"path": "Qwen3-0.6B"} | (model or {}),
        "data": {"train": {"path": "builtin:questions", "columns": {"instruction": "question", "output": "answer"}}},
        "train": {"max_length": 1024, "packing": True, "per_device_train_batch_size": 16} | (train or {}),
        "output_dir": str(folder / "run"),
    }
    return Recipe.parse(values | changes)


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.name)
def test_the_head_of_each_recipe_says_what_is_computed(recipe: Any, tmp_path: Path) -> None:
    head = (RECIPES / f"{recipe.name}.yaml").read_text().partition("algorithm:")[0]
    found = re.search(
        r"Memory: at most ([\d.]+) GiB at the peak( per rank of 8)?, which takes a GPU of ([\d.]+) GiB", head
    )
    assert found
    plan = planned(load_recipe(recipe.name), tmp_path, num_ranks=8 if found[2] else 1)
    assert (found[1], found[3]) == (f"{plan.peak / GIB:.1f}", f"{plan.smallest_gpu / GIB:.1f}")
    named = re.search(r"(?:one GPU of|one|two) (\d+) GB", head.partition("\n")[0])
    assert named is None or plan.smallest_gpu / GIB <= float(named[1])


@pytest.mark.parametrize(("checkpointing", "measured"), [(True, 9.9), (False, 30.2)])
def test_the_peak_of_an_update_is_the_one_measured_on_a_gpu(
    checkpointing: bool, measured: float, tmp_path: Path
) -> None:
    """benchmarks/RESULTS.md, 2026-11-27: one H200, rows of at most 16,384 tokens."""
    recipe = sft(tmp_path, train={"gradient_checkpointing": checkpointing})
    plan = planned(recipe, tmp_path)
    assert plan.micro_batch.tokens == 16_384
    assert (plan.total(BACKWARD) - CONTEXT_BYTES) / GIB == pytest.approx(measured, rel=0.05)


def test_settings_change_the_parts_that_they_should(tmp_path: Path) -> None:
    total = 596_049_920
    plain = planned(sft(tmp_path), tmp_path).parts
    assert plain["weights"][STEP] == plain["gradients"][STEP] == 4 * total
    assert plain["optimizer"][STEP] == 8 * total
    sharded = planned(sft(tmp_path, parallel={"zero_stage": 3}), tmp_path, num_ranks=4).parts
    assert sharded["weights"][LOAD] == 4 * total  # each rank loads the whole model first
    assert sharded["weights"][STEP] == sharded["gradients"][STEP] == 2 * total / 4
    assert sharded["optimizer"][STEP] == 12 * total / 4
    offloaded = planned(sft(tmp_path, parallel={"zero_stage": 1, "offload_optimizer": True}), tmp_path).parts
    assert "optimizer" not in offloaded
    masters = planned(sft(tmp_path, train={"master_weights": True}), tmp_path).parts
    sizes = [masters[part][STEP] for part in ("weights", "gradients", "optimizer")]
    assert sizes == [2 * total, 4 * total, 12 * total]
    eight_bits = planned(sft(tmp_path, train={"optim": "adamw_bnb_8bit"}), tmp_path).parts
    assert eight_bits["optimizer"][STEP] == (2 + 8 / 256) * total
    kinds = (True, "selective", False)
    kept = [planned(sft(tmp_path, train={"gradient_checkpointing": kind}), tmp_path).total(BACKWARD) for kind in kinds]
    assert kept[1] - kept[0] < 28 * 16_384 * 2 * (2 * 2048 + 4 * 16)
    assert kept[0] < kept[1] < kept[2] / 2
    cut = planned(sft(tmp_path, parallel={"sequence_parallel_size": 2}), tmp_path, num_ranks=2).parts
    assert cut["activations"][BACKWARD] == plain["activations"][BACKWARD] / 2
    several = planned(sft(tmp_path, train={"gradient_accumulation_steps": 2}), tmp_path).parts
    few = planned(sft(tmp_path, train={"max_tokens_per_micro_batch": 2048}), tmp_path).parts
    assert few["activations"][BACKWARD] == several["activations"][BACKWARD] / 8
    lora = {"lora": {"r": 8, "target_modules": ["q_proj"]}, "dtype": "bfloat16"}
    adapted = planned(sft(tmp_path, model=lora), tmp_path).parts
    trained = 28 * 8 * (1024 + 2048)
    assert adapted["weights"][STEP] == 2 * total + 4 * trained
    assert adapted["gradients"][STEP] == 4 * trained
    small = planned(sft(tmp_path), tmp_path, longest=10)  # packed rows are filled whatever the data
    assert small.micro_batch.tokens == 16_384
    rows = planned(sft(tmp_path, train={"packing": False}), tmp_path, longest=100)
    assert rows.micro_batch.tokens == 1600


def test_engines_take_their_share_of_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    values = {
        "algorithm": "grpo",
        "model": {"path": "Qwen3-0.6B"},
        "data": {"train": {"path": "builtin:questions", "columns": {"prompt": "question", "solution": "answer"}}},
        "rewards": ["accuracy"],
        "rollout": {"engine": "vllm", "gpu_memory_utilization": 0.5},
        "train": {"max_completion_length": 64, "max_prompt_length": 64, "per_device_train_batch_size": 16},
        "output_dir": str(tmp_path / "run"),
    }
    plan = planned(Recipe.parse(values), tmp_path)
    assert plan.micro_batch.tokens == 16 * 64 + 2 * 64
    assert plan.engine_share == 0.5
    assert plan.engine_sleeps
    awake = max(plan.total(SAMPLING), plan.total(SYNC))
    assert plan.smallest_gpu == pytest.approx(max(plan.peak / USABLE, awake / (USABLE - 0.5)))
    busy = {"engine": "vllm", "gpu_memory_utilization": 0.5, "max_staleness": 1}
    awake_always = planned(Recipe.parse(values | {"rollout": busy}), tmp_path)
    assert awake_always.smallest_gpu == pytest.approx(awake_always.peak / (USABLE - 0.5))
    free = planned(Recipe.parse(values | {"rollout": {"engine": "vllm"}}), tmp_path)
    assert free.engine_share == 0.0
    assert free.smallest_gpu == pytest.approx(max(free.peak, awake + free.engine_bytes) / USABLE)
    cache = 128 * 28 * 2 * 2 * 8 * 128  # keys and values of the longest sequence, in bf16
    assert plan.engine_bytes == 2 * 596_049_920 + cache + ENGINE_WORKSPACE
    assert plan.total(SYNC) < plan.total(BACKWARD)
    assert plan.engine_memory(40 * GIB) == dict.fromkeys(plan.shared_phases, 20 * GIB)
    assert plan.engine_memory(None)[SYNC] == pytest.approx(0.5 * plan.smallest_gpu)
    alone = planned(Recipe.parse(values | {"rollout": {"engine": "transformers"}}), tmp_path)
    assert alone.engine_share == 0.0
    assert alone.smallest_gpu == pytest.approx(alone.peak / USABLE)
    own_gpus = {"engine": "vllm", "ray_address": "ray://host:1"}
    assert planned(Recipe.parse(values | {"rollout": own_gpus}), tmp_path).engine_share == 0.0


def test_what_does_not_fit_is_refused_with_the_cheapest_change(tmp_path: Path) -> None:
    model = {"path": str(folder_of("Qwen3-8B", tmp_path / "model"))}
    recipe = sft(tmp_path, model=model)
    (fault,) = check_recipe(recipe, gpu_gib=80.0).faults
    assert "memory: optimizer step takes" in str(fault) or "memory: forward/backward takes" in str(fault)
    assert "this one has 80.0 GiB; the cheapest change that fits is parallel.zero_stage=1" in str(fault)
    assert "parallel.offload_optimizer=true" in str(fault)
    (fault,) = check_recipe(recipe, gpu_gib=30.0).faults
    assert "the cheapest change that fits is model.lora='{r: 16}' model.dtype=bfloat16" in str(fault)
    (fault,) = check_recipe(recipe, gpu_gib=8.0).faults
    assert "no change of its keys fits" in str(fault)
    wide = sft(tmp_path, model=model, train={"gradient_checkpointing": False})
    wide.model.lora = recipe.model.lora
    (fault,) = check_recipe(wide, gpu_gib=170.0).faults
    assert "the cheapest change that fits is train.gradient_checkpointing=selective" in str(fault)
    assert check_recipe(recipe, gpu_gib=141.0).faults == []


def have_gpus(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """Pretend that this machine has GPUs of `gib`."""
    for module in ("memory_estimate", "recipe_check"):
        monkeypatch.setattr(f"rlqwen.preflight.{module}.own_gpu_bytes", lambda: gib * GIB)


def complete(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a model's folder with a file in the place of its weights, which are not looked at."""
    monkeypatch.setattr("rlqwen.preflight.pipeline_check.check_model", lambda *args, **options: None)
    folder_of(name, folder)
    save_file({"model.norm.weight": torch.zeros(1)}, folder / "model.safetensors")
    return str(folder)


def test_a_run_refuses_what_does_not_fit_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sft(tmp_path, model={"path": complete("Qwen3-8B", tmp_path / "model", monkeypatch)})
    check_before_run([recipe])  # there is no GPU
    have_gpus(monkeypatch, 80.0)
    refusal = r"this one has 80\.0 GiB; the cheapest change that fits is .*: --ignore-memory runs all the same"
    with pytest.raises(ResourceError, match=refusal):
        check_before_run([recipe])
    check_before_run([recipe], ignore_memory=True)
    recipe.train.use_cpu = True
    check_before_run([recipe])


def test_a_run_looks_for_the_longest_row_where_the_longest_allowed_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"path": complete("Qwen3-0.6B", tmp_path / "model", monkeypatch)}
    recipe = sft(tmp_path, model=model, train={"packing": False, "max_length": 32768})
    assert plan_of_longest(recipe, tmp_path) > 40 * GIB
    have_gpus(monkeypatch, 40.0)
    check_before_run([recipe])
    have_gpus(monkeypatch, 9.0)
    with pytest.raises(ResourceError, match="memory: "):
        check_before_run([recipe])


def plan_of_longest(recipe: Recipe, folder: Path) -> float:
    """Return the GPU that rows as long as the config allows would need."""
    facts = read_config(recipe.model, folder)
    assert facts is not None
    return plan_memory(recipe, ModelSize.measure(recipe, facts)).smallest_gpu


@pytest.mark.parametrize("use_cpu", [False, True])
def test_where_there_is_no_gpu_the_table_is_of_this_machine(tmp_path: Path, use_cpu: bool) -> None:
    model = {"path": str(folder_of("Qwen3-0.6B", tmp_path / "model"))}
    report = check_recipe(sft(tmp_path, model=model, train={"use_cpu": use_cpu}))
    line = dict(report.facts)["memory"]
    assert re.search(r"at the peak, in .*; this machine has [\d.]+ GiB, and trains on its CPU", line)
    assert line.endswith("; --gpu-memory plans for a GPU") is not use_cpu
    (figures,) = report.figures
    assert "CUDA contexts" not in [row[0] for row in figures.rows]
    if not use_cpu:
        assert "a GPU of" in dict(check_recipe(sft(tmp_path, model=model), gpu_gib=24.0).facts)["memory"]


def test_the_command_prints_the_table_for_a_gpu_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    model = folder_of("Qwen3-0.6B", tmp_path / "model")
    words = ["check", "sft_gsm8k_qwen3_0.6b", f"model.path={model}", "data.train.path=builtin:questions"]
    assert main([*words, "--gpu-memory", "24"]) == 0
    shown = capsys.readouterr().out
    for part in ("weights", "gradients", "optimizer", "activations", "head", "CUDA contexts", "total"):
        assert re.search(rf"^ *{part} .*\d\.\d\d", shown, re.MULTILINE), part
    assert all(phase in shown for phase in (LOAD, BACKWARD, STEP, "peak"))
    assert SYNC not in shown
    assert main([*words, "--gpu-memory", "6"]) == 2
