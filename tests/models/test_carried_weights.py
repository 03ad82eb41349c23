"""Test that every saved folder keeps each byte of a Qwen3.5 checkpoint's vision tower and prediction weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5ForSequenceClassification,
    Qwen3_5MoeForConditionalGeneration,
)

from rlqwen.config import TrainerConfig
from rlqwen.errors import ModelError, SaveError
from rlqwen.models.carried_weights import carried_by
from rlqwen.models.critic import ScalarModel
from rlqwen.models.hub import commits
from rlqwen.models.loading import load_model, load_scalar_model
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import resolve_model_path
from rlqwen.rollout.weight_sync import ExpectedWeights, sent_bytes
from rlqwen.runs.export import ExportOptions, export_model

ARGS = TrainerConfig(output_dir="unused", use_cpu=True, bf16=False)
CLASSES: dict[str, Any] = {
    "tiny-qwen3.5": Qwen3_5ForConditionalGeneration,
    "tiny-qwen3.5-moe": Qwen3_5MoeForConditionalGeneration,
}
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cache = tmp_path_factory.mktemp("models")
    names = (*CLASSES, "tiny-qwen3-next", "tiny-qwen3.5-text")
    return {name: Path(resolve_model_path(f"builtin:{name}", cache)) for name in names}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, Any] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return weights


def is_carried(name: str) -> bool:
    return name.startswith(("mtp.", "model.visual."))


def assert_kept(folder: Path, source: Path) -> None:
    """Check that both folders have the same names, and carried weights the same bits."""
    before, after = stored(source), stored(folder)
    assert set(before) - {"lm_head.weight"} == set(after) - {"lm_head.weight"}
    carried = [name for name in before if is_carried(name)]
    assert carried
    for name in carried:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name


def changed(policy: Any) -> Any:
    """Change every trained weight, in place of an update."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trained_parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return policy


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model.eval()(input_ids=IDS).logits
    return answer


def own_logits(policy: Policy) -> torch.Tensor:
    with policy.generation_model() as model:
        return logits(model)


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_saved_folder_loads_as_the_class_with_the_vision_tower(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    policy = changed(Policy(load_model(str(sources[name]), ARGS), ARGS))
    policy.save(tmp_path)
    assert_kept(tmp_path, sources[name])
    whole, report = CLASSES[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert {key for key in report["unexpected_keys"] if not key.startswith("mtp.")} == set()
    expected = own_logits(policy)
    torch.testing.assert_close(logits(whole), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=0)
    source = CLASSES[name].from_pretrained(sources[name])
    for (key, kept), (_, original) in zip(
        whole.model.visual.named_parameters(), source.model.visual.named_parameters(), strict=True
    ):
        assert torch.equal(kept, original), key


def test_config_and_processor_files_are_copied_from_the_source(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["tiny-qwen3.5"]
    Policy(load_model(str(source), ARGS), ARGS).save(tmp_path)
    before, after = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (source, tmp_path))
    assert after["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    assert after["vision_config"] == before["vision_config"]
    changed_keys = {key for key in before["text_config"] if after["text_config"].get(key) != before["text_config"][key]}
    assert changed_keys <= {"dtype"}
    for file in source.glob("*processor_config.json"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_multi_token_prediction_weights_of_qwen3_next_are_kept(sources: dict[str, Path], tmp_path: Path) -> None:
    policy = changed(Policy(load_model(str(sources["tiny-qwen3-next"]), ARGS), ARGS))
    policy.save(tmp_path)
    assert_kept(tmp_path, sources["tiny-qwen3-next"])
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), own_logits(policy), atol=1e-5, rtol=0
    )


def test_carried_weights_keep_their_dtype_if_another_is_trained(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["tiny-qwen3.5"]
    args = ARGS.model_copy(update={"model_init_kwargs": {"dtype": "bfloat16"}})
    policy = Policy(load_model(str(source), args), args)
    policy.save(tmp_path, dtype=torch.bfloat16)
    assert_kept(tmp_path, source)
    after = stored(tmp_path)
    assert after["model.language_model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["text_config"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_merged_adapter_is_saved_with_the_carried_weights(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    policy = Policy(
        load_model(str(sources[name]), ARGS), ARGS, peft_config=LoraConfig(r=4, target_modules="all-linear")
    )
    assert not any("visual" in key for key in policy.trained_names)
    changed(policy).save(tmp_path)
    assert_kept(tmp_path, sources[name])
    torch.testing.assert_close(
        logits(CLASSES[name].from_pretrained(tmp_path)), own_logits(policy), atol=1e-4, rtol=1e-4
    )


def test_a_checkpoint_is_restored_and_also_loads_as_a_model(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["tiny-qwen3.5"]
    policy = changed(Policy(load_model(str(source), ARGS), ARGS))
    policy.save_checkpoint(tmp_path / "one")
    fresh = Policy(load_model(str(source), ARGS), ARGS)
    fresh.load_checkpoint(tmp_path / "one")
    assert torch.equal(own_logits(fresh), own_logits(policy))
    Policy(load_model(str(tmp_path / "one"), ARGS), ARGS).save(tmp_path / "two")
    assert_kept(tmp_path / "two", source)


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_model_object_with_a_vision_tower_is_saved_with_its_own_tower(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    whole = CLASSES[name].from_pretrained(sources[name])
    with torch.no_grad():
        next(whole.model.visual.parameters()).add_(1.0)  # a change by the user must be kept
    policy = changed(Policy(whole, ARGS))
    assert "vision tower" in (policy.kept_note or "")
    assert not any(parameter.requires_grad for parameter in whole.model.visual.parameters())
    policy.save(tmp_path)
    assert {key for key in stored(sources[name]) if key.startswith("mtp.")} <= set(stored(tmp_path))
    saved = CLASSES[name].from_pretrained(tmp_path)
    assert torch.equal(next(saved.model.visual.parameters()), next(whole.model.visual.parameters()))
    torch.testing.assert_close(logits(saved), own_logits(policy), atol=1e-5, rtol=0)


def test_counts_of_carried_parameters_are_exact(sources: dict[str, Path]) -> None:
    policy = Policy(load_model(str(sources["tiny-qwen3.5"]), ARGS), ARGS)
    carried = carried_by(policy.base_model)
    assert carried is not None
    expected = sum(tensor.numel() for name, tensor in stored(sources["tiny-qwen3.5"]).items() if is_carried(name))
    assert sum(carried.counts().values()) == expected
    assert set(carried.counts()) == {"vision tower", "multi-token prediction"}


def test_a_text_only_folder_carries_only_what_it_has(sources: dict[str, Path], tmp_path: Path) -> None:
    policy = changed(Policy(load_model(str(sources["tiny-qwen3.5-text"]), ARGS), ARGS))
    policy.save(tmp_path)
    assert set(stored(tmp_path)) - {"lm_head.weight"} == set(stored(sources["tiny-qwen3.5-text"])) - {"lm_head.weight"}
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["architectures"] == ["Qwen3_5ForCausalLM"]


def test_a_deleted_source_is_still_read_and_an_overwritten_one_is_refused(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    for number in (1, 2):
        shutil.copytree(sources["tiny-qwen3.5"], tmp_path / f"base{number}")
    gone, spoiled = (Policy(load_model(str(tmp_path / f"base{number}"), ARGS), ARGS) for number in (1, 2))
    shutil.rmtree(tmp_path / "base1")
    gone.save(tmp_path / "out")
    assert_kept(tmp_path / "out", sources["tiny-qwen3.5"])
    file = tmp_path / "base2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(SaveError, match="overwritten since the model was loaded"):
        spoiled.save(tmp_path / "out2")


@pytest.mark.parametrize("name", list(CLASSES))
def test_reward_models_keep_the_carried_weights(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model, has_head = load_scalar_model(str(sources[name]), ARGS)
    assert not has_head
    reward = changed(ScalarModel(model, ARGS))
    reward.save(tmp_path)
    before, after = stored(sources[name]), stored(tmp_path)
    assert {key for key in before if is_carried(key)} == {key for key in after if is_carried(key)}
    again, has_head = load_scalar_model(str(tmp_path), ARGS)
    assert has_head
    assert torch.equal(again.state_dict()["score.weight"], reward.base_model.state_dict()["score.weight"])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.vision_config is not None
    if name == "tiny-qwen3.5":
        loaded: Any = Qwen3_5ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
        _, report = loaded
        assert not report["missing_keys"]


def test_only_the_text_model_is_sent_to_rollout_workers(sources: dict[str, Path]) -> None:
    source = sources["tiny-qwen3.5"]
    policy = Policy(load_model(str(source), ARGS), ARGS)
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.export_weights()}
    assert not any(is_carried(name) for name in shapes)
    ExpectedWeights(str(source)).check(shapes)
    assert sent_bytes(str(source), "float32", None) < sum(tensor.numel() * 4 for tensor in stored(source).values())


def test_missing_weights_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(sources["tiny-qwen3.5-text"], folder)
    from safetensors.torch import save_file

    weights = stored(folder)
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights.*model\.norm\.weight"):
        load_model(str(folder), ARGS)


def test_export_casts_and_quantizes_only_the_text_model(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["tiny-qwen3.5"]
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    export_model(ExportOptions(str(source), str(tmp_path / "cast"), dtype="bfloat16"))
    assert_kept(tmp_path / "cast", source)
    pytest.importorskip("compressed_tensors", reason="reads int8 weights for transformers")
    with pytest.warns(UserWarning, match="not in int8"):
        export_model(ExportOptions(str(source), str(tmp_path / "int8"), int8=True))
    for cls in (AutoModelForCausalLM, Qwen3_5ForConditionalGeneration):
        model = cls.from_pretrained(tmp_path / "int8")
        gap = (logits(model) - expected).abs().mean()
        assert 1e-6 < gap < 0.05
    visual = Qwen3_5ForConditionalGeneration.from_pretrained(source).model.visual.state_dict()
    assert all(torch.equal(model.model.visual.state_dict()[name], weight) for name, weight in visual.items())


def test_the_processor_of_a_hub_model_is_fetched_at_the_same_commit(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetch these files, because loading a model alone does not put them into the hub's cache."""
    commit, repository = "c" * 40, tmp_path / "models--owner--tiny"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(sources["tiny-qwen3.5"], snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    contents = {path.name: path.read_bytes() for path in snapshot.glob("*preprocessor_config.json")}
    for name in contents:
        (snapshot / name).unlink()
    asked = []

    def download(name: str, **options: Any) -> str:
        if "allow_patterns" in options:
            asked.append((name, options["revision"]))
            for file, content in contents.items():
                (snapshot / file).write_bytes(content)
        return str(snapshot)

    monkeypatch.setattr("rlqwen.models.carried_weights.snapshot_download", download)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = load_model("owner/tiny", ARGS.model_copy(update={"model_init_kwargs": {"cache_dir": str(tmp_path)}}))
    Policy(model, ARGS).save(tmp_path / "out")
    assert asked == [("owner/tiny", commit)]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in contents} == contents
    assert commits()["owner/tiny"] == commit


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_carried_weights_of_a_quantized_model_come_from_its_files(
    bits: dict[str, bool], sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["tiny-qwen3.5"]
    model = Qwen3_5ForConditionalGeneration.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**bits), device_map={"": "cpu"}
    )
    policy = Policy(model, ARGS, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    policy.check_trainable()
    policy.save(tmp_path)
    assert_kept(tmp_path, source)


def test_an_adapter_on_the_class_with_a_tower_is_saved_for_the_text_only_class(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["tiny-qwen3.5"]
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
    model = get_peft_model(Qwen3_5ForConditionalGeneration.from_pretrained(source), config)
    with pytest.warns(UserWarning, match="saved as one of Qwen3_5ForCausalLM"):
        policy = changed(Policy(model, ARGS))
    policy.save_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path)
    torch.testing.assert_close(logits(loaded), own_logits(policy), atol=1e-5, rtol=0)
