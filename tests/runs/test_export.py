"""Test `rlqwen export`: the exported model loads and computes the same, and its card says where it came from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from rlqwen.cli import main
from rlqwen.config import SFTConfig
from rlqwen.errors import ConfigError
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import build_tiny_qwen3, resolve_model_path
from rlqwen.runs.export import ExportOptions, export_model, find_source, int8_weights, parse_size
from tests.models.test_policy import padded_logprobs, skewed_trees

SHAPE = {"hidden_size": 64, "num_layers": 2, "intermediate_size": 128, "num_heads": 2, "num_kv_heads": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("base") / "tiny", initializer_range=0.1, **SHAPE)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the run folder of GRPO with DoRA that started from an SFT run's final model."""
    root = tmp_path_factory.mktemp("runs")
    write_recipe(root / "sft", "sft", {"path": "Qwen/Qwen3-0.6B"}, [{"path": "openai/gsm8k"}])
    folder = root / "grpo"
    write_recipe(folder, "grpo", {"path": str(root / "sft" / "final")}, [{"path": str(base / "rows.jsonl")}])
    summary = {
        "algorithm": "grpo", "steps": 12, "seed": 7, "initial_eval": {"eval/reward/mean": 0.25, "eval/time": 1.0},
        "final_eval": {"eval/reward/mean": 0.875, "eval/time": 1.0}, "versions": {"rlqwen": "9.9"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    policy = adapted(base)
    for place, dtype in ((folder / "final", None), (folder / "checkpoints" / "step-000012", torch.float32)):
        policy.save(place, dtype=dtype)
        policy.save_adapter(place / "adapter")
        AutoTokenizer.from_pretrained(base).save_pretrained(place)
    return folder


def write_recipe(folder: Path, algorithm: str, model: dict[str, Any], train: list[dict[str, Any]]) -> None:
    folder.mkdir()
    recipe = {"algorithm": algorithm, "model": model, "data": {"train": train}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def adapted(base: Path) -> Policy:
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    return Policy(AutoModelForCausalLM.from_pretrained(base), SFTConfig(), peft_config=lora)


def logprobs(folder: Path | str, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return padded_logprobs(AutoModelForCausalLM.from_pretrained(folder, **options), skewed_trees())


@pytest.mark.parametrize("part", ["", "final", "final/adapter", "checkpoints/step-000012"])
def test_a_run_or_a_part_of_it_is_exported(run: Path, base: Path, tmp_path: Path, part: str) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run / part), str(out)]) == 0
    torch.testing.assert_close(logprobs(out), logprobs(run / "final"), atol=2e-5, rtol=1e-4)
    assert (logprobs(out) - logprobs(base)).abs().max() > 0.05
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert not (out / "adapter").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.datasets == ["openai/gsm8k"]
    assert card.data.tags == ["rlqwen", "sft", "grpo"]
    for text in (
        "# out\n",
        "sft, then grpo on openai/gsm8k, rows.jsonl",
        "| reward/mean | 0.25 | 0.875 |",
        "rlqwen 9.9",
    ):
        assert text in card.content
    assert (run / "recipe.yaml").read_text() in card.content


def test_an_export_is_cast_and_sharded(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(["export", str(run), str(out), "--dtype", "bfloat16", "--shard-size", "50KB"]) == 0
    shards = list(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype is torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in model.state_dict().items())


def test_int8_loads_in_transformers(run: Path, tmp_path: Path) -> None:
    """Load with compressed-tensors, which vLLM installs."""
    pytest.importorskip("compressed_tensors", reason="reads int8 weights for transformers")
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--int8"]) == 0
    gap = (logprobs(out) - logprobs(run / "final")).abs().mean()
    assert 1e-5 < gap < 0.1
    weights = (out / "model.safetensors").stat().st_size
    assert weights < 0.75 * (run / "final" / "model.safetensors").stat().st_size
    assert "int8" in (out / "README.md").read_text()


def test_int8_lists_the_projections_that_it_leaves_unquantized(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="in_proj_a, in_proj_b, in_proj_qkv, in_proj_z, out_proj") as caught:
        export_model(ExportOptions(resolve_model_path("builtin:tiny-qwen3.5", tmp_path), str(out), int8=True))
    assert str(caught[0].message).removeprefix("not") in (out / "README.md").read_text()


def test_int8_rounds_to_half_a_step() -> None:
    weight = torch.tensor([[127.0, -63.4, 0.0], [0.0, 0.0, 0.0], [-0.254, 0.1, 0.2]])
    stream = dict(int8_weights([("model.layers.0.mlp.up_proj.weight", weight), ("model.norm.weight", torch.ones(3))]))
    assert list(stream) == [f"model.layers.0.mlp.up_proj.weight{end}" for end in ("", "_scale")] + ["model.norm.weight"]
    codes, scale = (stream[f"model.layers.0.mlp.up_proj.weight{end}"] for end in ("", "_scale"))
    assert codes.tolist() == [[127, -63, 0], [0, 0, 0], [-127, 50, 100]]
    torch.testing.assert_close(scale[:, 0], torch.tensor([1.0, 1e-12 / 127, 0.002]))


def test_a_quantized_model_is_exported_dequantized(base: Path, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional extra")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    assert isinstance(model.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    model.save_pretrained(tmp_path / "four")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "four")
    export_model(ExportOptions(str(tmp_path / "four"), str(tmp_path / "out")))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # Use training mode, because in eval mode bitsandbytes may compute in bfloat16 on a CPU.
    expected = padded_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "four").train(), skewed_trees()).detach()
    torch.testing.assert_close(logprobs(tmp_path / "out"), expected, atol=5e-5, rtol=1e-4)


def test_a_reward_model_is_exported_as_one(base: Path, tmp_path: Path) -> None:
    config = Qwen3Config.from_pretrained(base, num_labels=1, pad_token_id=0)
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "rm")
    export_model(ExportOptions(str(tmp_path / "rm"), str(tmp_path / "out"), dtype="bfloat16"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert torch.equal(loaded.score.weight, expected.score.weight.bfloat16())


def test_a_model_without_a_run_has_a_plain_card(base: Path, tmp_path: Path) -> None:
    export_model(ExportOptions(str(base), str(tmp_path / "out")))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None
    assert f"Exported by rlqwen from `{base.name}`." in card.content
    assert "## Recipe" not in card.content


def test_wrong_arguments_of_export_are_refused_with_the_reason(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    adapter = tmp_path / "adapter"
    policy = adapted(base)
    policy.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    policy.save_adapter(adapter)
    for arguments, message in (
        ([str(base), str(full)], "exists and is not an empty folder"),
        ([str(full), str(tmp_path / "out")], "holds no finished run, model or adapter; it holds notes.txt"),
        ([str(tmp_path / "none"), str(tmp_path / "out")], "there is no such folder"),
        ([str(adapter), str(tmp_path / "out")], "its base cannot be used"),
        ([str(run), str(tmp_path / "out"), "--base", str(base)], "--base is for adapters"),
        ([str(run), str(tmp_path / "out"), "--shard-size", "many"], "shard size 'many' is no size"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "out").exists()
    # A base model given by --base works.
    assert main(["export", str(adapter), str(tmp_path / "out"), "--base", str(base)]) == 0
    torch.testing.assert_close(logprobs(tmp_path / "out"), logprobs(run / "final"), atol=2e-5, rtol=1e-4)


def test_an_unfinished_run_exports_its_newest_checkpoint(tmp_path: Path, base: Path) -> None:
    for step in (5, 10):
        policy_folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(policy_folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(policy_folder)
    assert find_source(str(tmp_path)).model.endswith("step-000010")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("300", 300), ("20k", 20_000)])
def test_shard_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size
    with pytest.raises(ConfigError):
        parse_size(f"{text} or so")
