"""Test parameter counts of every Qwen from its config alone, and recipes with a model folder without weights."""

import atexit
import functools
import json
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, Qwen3VLConfig

from rlqwen.cli import cli
from rlqwen.config import DistillationConfig, LoraSettings, Recipe
from rlqwen.config.recipe_yaml import PackagedRecipe, list_recipes, load_recipe
from rlqwen.errors import ModelError
from rlqwen.models.tiny import resolve_model_path
from rlqwen.preflight import CheckReport, check_before_run, check_recipe
from rlqwen.preflight.parameter_counts import count_parameters, meta_model, trained_parameters
from tests.narrowing import only_source, present

CONFIGS = Path(__file__).parents[2] / "rlqwen" / "planning" / "configs"
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-Next-80B-A3B": 79_674_391_296,
    "Qwen3.5-0.8B": 873_438_784,
    "Qwen3.5-2B": 2_274_069_824,
    "Qwen3.5-4B": 4_659_865_088,
    "Qwen3.5-9B": 9_653_104_368,
    "Qwen3.5-27B": 27_781_427_952,
    "Qwen3.5-35B-A3B": 35_951_822_704,
    "Qwen3.5-122B-A10B": 125_086_497_008,
    "Qwen3.5-397B-A17B": 403_397_928_944,
    "Qwen3.6-27B": 27_781_427_952,
    "Qwen3.6-35B-A3B": 35_951_822_704,
    "Qwen3.8-27B": 27_781_427_952,
    "Qwen3.8-2.4T-A95B": 2_446_182_725_504,
}
"""Parameters of the published weights, vision tower and multi-token prediction included; see README.md beside the configs."""
ACTIVE = {"A3B": (3.3e9, 3.9e9), "A10B": (9.7e9, 10.5e9), "A17B": (16.5e9, 17.5e9), "A22B": (21.5e9, 22.5e9),
          "A95B": (93e9, 97e9)}  # fmt: skip


def config_of(name: str) -> Any:
    return AutoConfig.from_pretrained(CONFIGS / f"{name}.json")


def folder_of(name: str, folder: Path, *, tokenizer: bool = True) -> Path:
    """Make a folder with the config of a published model and the tokenizer of the tiny one, without weights."""
    folder.mkdir()
    (folder / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    if tokenizer:
        kind = "tiny-qwen3.5" if name.startswith(("Qwen3.5", "Qwen3.6", "Qwen3.8")) else "tiny-qwen3"
        for file in tiny_tokenizer(kind).iterdir():
            shutil.copy(file, folder)
    return folder


@functools.cache
def tiny_tokenizer(kind: str) -> Path:
    """Make the folder of a tiny model's tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(f"builtin:{kind}", scratch))
    folder = Path(tempfile.mkdtemp(prefix=f"rlqwen-test-{kind}-"))
    atexit.register(shutil.rmtree, folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_config_has_a_published_parameter_count() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_those_of_published_weights(name: str) -> None:
    config = config_of(name)
    counts = count_parameters(config, meta_model(config))
    assert counts.total + sum(counts.carried.values()) == PUBLISHED[name]
    low, high = ACTIVE.get(name.rpartition("-")[2], (counts.total, counts.total))
    assert low <= counts.active <= high
    assert "other" not in counts.parts
    assert ("delta-net" in counts.parts) == (config.model_type[:7] in ("qwen3_5", "qwen3_n"))


@pytest.mark.parametrize("kind", ["qwen3.5", "qwen3.5-moe", "qwen3-next", "qwen3-moe"])
def test_parameter_counts_equal_those_of_the_weight_files(kind: str, tmp_path: Path) -> None:
    folder = Path(resolve_model_path(f"builtin:tiny-{kind}", tmp_path))
    stored = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            stored += sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 - no mapping
    config = AutoConfig.from_pretrained(folder)
    counts = count_parameters(config, meta_model(config), folder)
    assert counts.total + sum(counts.carried.values()) == stored
    if kind.startswith("qwen3.5"):  # Qwen3-Next's config says nothing of multi-token prediction
        assert count_parameters(config, meta_model(config)) == counts


def test_the_text_part_of_a_vision_model_is_counted_separately() -> None:
    config = Qwen3VLConfig(text_config={"num_hidden_layers": 2}, vision_config={"depth": 2})
    model = meta_model(config)
    counts = count_parameters(config, model)
    assert counts.carried.keys() == {"vision tower"}
    assert counts.total + counts.carried["vision tower"] == sum(weight.numel() for weight in model.parameters())
    assert set(counts.parts) == {"embedding", "attention", "MLP", "norms", "head"}


def test_a_scalar_head_counts_as_one_row() -> None:
    config = config_of("Qwen3.5-9B")
    counts = count_parameters(config, meta_model(config, scalar=True))
    assert counts.parts["head"] == 4096
    assert counts.carried == count_parameters(config, meta_model(config)).carried


def test_trained_parameters_are_reported_per_target() -> None:
    model = meta_model(config_of("Qwen3.6-35B-A3B"))
    targets = ["q_proj", "in_proj_qkv", "out_proj", "experts", "shared_expert.down_proj"]
    trained, notes = trained_parameters(model, LoraSettings(r=8, target_modules=targets))
    width, rank, experts = 2048, 8, 256
    assert trained == {
        "q_proj": 10 * rank * (width + 2 * 4096),
        "in_proj_qkv": 30 * rank * (width + 8192),
        "out_proj": 30 * rank * (width + 4096),
        "experts": 40 * experts * rank * ((width + 1024) + (width + 512)),
        "shared_expert.down_proj": 40 * rank * (width + 512),
    }
    assert notes == []
    with pytest.raises(ModelError, match=r"'in_proj_qvk' matches nothing.*did you mean in_proj_qkv"):
        trained_parameters(meta_model(config_of("Qwen3.5-0.8B")), LoraSettings(target_modules=["in_proj_qvk"]))


# Whole recipes against a folder without weights


def sft_recipe(path: Path, folder: Path, **changes: Any) -> Recipe:
    values = {
        "algorithm": "sft",
        "model": {"path": str(path)},
        "data": {"train": {"path": "builtin:questions", "columns": {"instruction": "question", "output": "answer"}}},
        "train": {"max_length": 128},
        "output_dir": str(folder / "run"),
    }
    return Recipe.parse(values | changes)


def test_a_folder_without_weights_can_be_checked_but_not_run(tmp_path: Path) -> None:
    recipe = sft_recipe(folder_of("Qwen3.5-397B-A17B", tmp_path / "model"), tmp_path)
    report = check_recipe(recipe)
    assert report.faults == []
    facts = dict(report.facts)
    assert "context 262,144, bfloat16" in facts["model"]
    assert facts["parameters"].startswith("396 B, 17.3 B active for each token: embedding 1.02 B, attention 1.57 B")
    assert "routed experts 387 B (10 of 512 a token)" in facts["parameters"]
    assert facts["carried"].startswith("vision tower 456 M, multi-token prediction 6.6 B: neither trained nor used")
    assert facts["trained"] == "all 396 B"
    (memory,) = report.figures
    assert [row[-1] for row in memory.rows[:3]] == ["1476.51", "1476.51", "2953.01"]  # 4, 4 and 8 bytes a parameter
    assert facts["data.train"].startswith("24 of 24 rows")
    (line,) = [warning for warning in report.warnings if "lacks weights" in warning]
    assert line.endswith("checked without; a run would refuse it")
    with pytest.raises(ModelError, match=r"lacks weights \(model\.safetensors\)"):
        check_before_run([recipe])


def test_a_config_alone_is_checked_as_far_as_possible(tmp_path: Path) -> None:
    model = folder_of("Qwen3-Next-80B-A3B", tmp_path / "model", tokenizer=False)
    report = check_recipe(sft_recipe(model, tmp_path))
    assert report.faults == []
    assert any("lacks weights (model.safetensors) and a tokenizer" in warning for warning in report.warnings)
    facts = dict(report.facts)
    assert facts["parameters"].startswith("79.7 B, 3.87 B active")
    assert facts["data.train"] == "24 rows"
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (fault,) = check_recipe(sft_recipe(model, tmp_path)).faults  # half a download is no config to look at
    assert "lacks a tokenizer (tokenizer.json), model-1.safetensors" in str(fault)


def test_an_adapter_that_does_not_fit_is_found_without_weights(tmp_path: Path) -> None:
    model = folder_of("Qwen3.5-27B", tmp_path / "model")
    lora: dict[str, Any] = {
        "path": str(model),
        "dtype": "bfloat16",
        "lora": {"r": 16, "target_modules": ["q_proj", "experts"]},
    }
    (fault,) = check_recipe(sft_recipe(model, tmp_path, model=lora)).faults
    assert "target_modules: 'experts' matches nothing" in str(fault)
    lora["lora"]["target_modules"] = ["q_proj", "in_proj_qkv"]
    report = check_recipe(sft_recipe(model, tmp_path, model=lora))
    facts = dict(report.facts)
    assert facts["trained"] == "16.3 M (0.06%) in adapters: in_proj_qkv 11.8 M, q_proj 4.46 M; the rest is frozen"
    assert parts_of(report)["weights"] == pytest.approx((2 * 26.9e9 + 4 * 16.3e6) / 2**30, rel=0.01)


def test_thinking_is_reported_as_the_template_sets_it(tmp_path: Path) -> None:
    told = {}
    for name, options in (("Qwen3.5-4B", {}), ("Qwen3.5-9B", {"enable_thinking": False}), ("Qwen3-8B", {})):
        recipe = Recipe.parse(
            {
                "algorithm": "grpo",
                "model": {"path": str(folder_of(name, tmp_path / name))},
                "data": {
                    "train": {"path": "builtin:questions", "columns": {"prompt": "question", "solution": "answer"}}
                },
                "rewards": ["accuracy"],
                "rollout": {"engine": "transformers"},
                "train": {"max_completion_length": 64, "chat_template_kwargs": options},
                "output_dir": str(tmp_path / "run"),
            }
        )
        report = check_recipe(recipe)
        assert report.faults == []
        told[name] = dict(report.facts)["thinking"].partition(":")[0]
    assert told == {"Qwen3.5-4B": "on", "Qwen3.5-9B": "off", "Qwen3-8B": "left to the model"}


STAND_INS = {
    "openai/gsm8k": "builtin:questions",
    "llamafactory/alpaca_zh": "builtin:instructions_zh",
    "trl-lib/ultrafeedback_binarized": "builtin:pairs",
}
"""Hub datasets of the recipes -> rows of the same columns that come with rlqwen."""
SHIPPED = [recipe for recipe in list_recipes() if not recipe.name.startswith("quickstart")]


def head_of(recipe: PackagedRecipe) -> tuple[float, float, list[str]]:
    """Return from the head of a recipe's file the peak, the smallest GPU, and the command that prints them."""
    head = (
        (Path(__file__).parents[2] / "recipes" / f"{recipe.name}.yaml").read_text("utf-8").partition("\nalgorithm:")[0]
    )
    peak, smallest = present(re.search(r"at most ([\d.]+) GiB.* a GPU of ([\d.]+) GiB", head)).groups()
    (command,) = re.findall(r"^#   rlqwen (check .*)$", head, re.MULTILINE)
    return float(peak), float(smallest), command.split()


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.name)
def test_every_shipped_recipe_fits_the_config_of_its_model(
    recipe: PackagedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check each with the options that the head of its file names, which print the head's figures on any machine."""
    peak, smallest, command = head_of(recipe)
    parent = click.Context(cli, **cli.context_settings)
    given = cli.commands["check"].make_context("check", command[1:], parent=parent).params
    assert list(given["words"]) in ([recipe.name], [f"recipes/{recipe.name}.yaml"])
    assert given["gpu_memory"] >= smallest
    loaded = load_recipe(recipe.name)
    size = loaded.model.path.removeprefix("Qwen/").removesuffix("-Base").removesuffix("-Instruct")
    loaded.model.path = str(folder_of(size, tmp_path / "model"))
    source = only_source(loaded.data.train)
    source.path = STAND_INS[present(source.path)]
    if isinstance(loaded.train, DistillationConfig):
        teacher = present(loaded.train.teacher).removeprefix("Qwen/")
        loaded.train.teacher = str(folder_of(teacher, tmp_path / "teacher"))
    monkeypatch.chdir(tmp_path)
    if loaded.model.quantization is not None:
        monkeypatch.setattr("rlqwen.preflight.recipe_check.require_bitsandbytes", lambda key: None)
    report = check_recipe(loaded, gpu_gib=given["gpu_memory"], num_ranks=given["nproc_per_node"])
    assert report.faults == []
    facts = dict(report.facts)
    assert {"parameters", "trained", "memory", "batch"} <= set(facts)
    printed = re.findall(r"([\d.]+) GiB at the peak.* a GPU of ([\d.]+) GiB", facts["memory"])
    # Its rows may be shorter than those that the config allows, of which the head speaks.
    assert 0.7 * peak < float(printed[0][0]) <= peak + 0.05
    assert float(printed[0][1]) <= smallest + 0.05
    assert ("in_proj_qkv" in facts["trained"]) == (size.startswith(("Qwen3.5", "Qwen3.6")) and "lora" in recipe.name)
    assert not [warning for warning in report.warnings if "lacks weights" not in warning and "repeat" not in warning]


def parts_of(report: CheckReport) -> dict[str, float]:
    """Return the largest size of each part of the memory table, in GiB."""
    (memory,) = report.figures
    return {row[0]: float(row[-1]) for row in memory.rows}


def test_the_memory_table_counts_critic_reference_and_quantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlqwen.preflight.recipe_check.require_bitsandbytes", lambda key: None)
    model = folder_of("Qwen2.5-7B", tmp_path / "model")
    online = {
        "data": {"train": {"path": "builtin:questions", "columns": {"prompt": "question", "solution": "answer"}}},
        "rewards": ["accuracy"],
        "rollout": {"engine": "transformers"},
    }
    ppo = sft_recipe(model, tmp_path, algorithm="ppo", train={"max_completion_length": 64}, **online)
    whole = 7_615_616_512 / 2**30
    parts = parts_of(check_recipe(ppo, gpu_gib=1000.0))
    expected = {
        "weights": 4 * whole,
        "gradients": 4 * whole,
        "optimizer": 8 * whole,
        "critic": 16 * whole,
        "reference": 2 * whole,
    }
    assert {name: parts[name] for name in expected} == pytest.approx(expected, abs=0.01)
    student = {"max_completion_length": 64, "teacher": str(model)}
    distillation = sft_recipe(model, tmp_path, algorithm="distillation", train=student, **online | {"rewards": []})
    parts = parts_of(check_recipe(distillation, gpu_gib=1000.0))
    assert parts["teacher"] == pytest.approx(2 * whole, abs=0.01)
    assert not {"reference", "critic"} & parts.keys()
    quantized = {"path": str(model), "lora": {"r": 8}, "quantization": {"bits": 4}}
    linear = (822_121_472 + 5_703_204_864) / 2**30  # attention with its biases, and MLP
    adapters = 4 * 20.2e6 / 2**30
    weights = parts_of(check_recipe(sft_recipe(model, tmp_path, model=quantized)))["weights"]
    assert weights == pytest.approx(0.5 * linear + 2 * (whole - linear) + adapters, abs=0.01)


def test_settings_that_the_model_does_not_allow_are_found_without_weights(tmp_path: Path) -> None:
    online = {
        "algorithm": "grpo",
        "data": {"train": {"path": "builtin:questions", "columns": {"prompt": "question", "solution": "answer"}}},
        "rewards": ["accuracy"],
        "train": {"max_completion_length": 64},
        "rollout": {"routing_replay": True},
    }
    dense = folder_of("Qwen3.5-4B", tmp_path / "dense")
    report = check_recipe(sft_recipe(dense, tmp_path, parallel={"sequence_parallel_size": 2}))
    assert ["carry a state along the sequence" in str(fault) for fault in report.faults] == [True]
    report = check_recipe(sft_recipe(dense, tmp_path, **online))
    assert ["routing_replay is for mixtures of experts" in str(fault) for fault in report.faults] == [True]
    train = {"max_length": 128, "router_aux_loss_coef": 0.01}
    report = check_recipe(sft_recipe(dense, tmp_path, train=train))
    assert ["Qwen3_5ForCausalLM is none" in str(fault) for fault in report.faults] == [True]
    mixture = folder_of("Qwen3-30B-A3B", tmp_path / "mixture")
    parallel = {"autotp_size": 2}
    report = check_recipe(sft_recipe(mixture, tmp_path, train=train, parallel=parallel))
    assert ["AutoTP has no plan for fused experts" in str(fault) for fault in report.faults] == [True]
    parallel = {"sequence_parallel_size": 3}
    report = check_recipe(sft_recipe(mixture, tmp_path, parallel=parallel))
    assert ["it can be 2, 4, 8, 16, 32" in str(fault) for fault in report.faults] == [True]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_dtype_that_vllm_needs_for_delta_net_layers_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlqwen.rollout.resources._count_gpus", lambda: 0.0)
    online = {
        "algorithm": "grpo",
        "data": {"train": {"path": "builtin:questions", "columns": {"prompt": "question", "solution": "answer"}}},
        "rewards": ["accuracy"],
        "train": {"max_completion_length": 64},
    }
    model = folder_of("Qwen3.5-4B", tmp_path / "model")
    report = check_recipe(sft_recipe(model, tmp_path, **online, rollout={"engine": "vllm"}))
    assert report.faults == []
    assert "compute in bfloat16, not the policy's float32" in dict(report.facts)["rollout dtype"]
    report = check_recipe(sft_recipe(model, tmp_path, **online, rollout={"engine": "vllm", "dtype": "float32"}))
    assert ["compute in bfloat16 only" in " ".join(str(fault).split()) for fault in report.faults] == [True]
