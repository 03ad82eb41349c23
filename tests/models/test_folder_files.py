"""Test that a model's folder from anybody is read as data, or refused by file before weights are loaded."""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rlqwen.config import LoraSettings, Recipe, SFTConfig
from rlqwen.errors import InputError, ModelError
from rlqwen.models import model_classes, vision_language
from rlqwen.models.adapters import lora_config
from rlqwen.models.loading import load_model
from rlqwen.models.model_classes import check_weights, load_causal, load_scalar
from rlqwen.models.policy import Policy
from rlqwen.preflight import check_before_run, check_recipe
from rlqwen.trainers.sft import SFTTrainer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"


class Payload:
    """Write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def write_index(folder: Path, file: Any) -> Path:
    """Name one file for all weights; return the index."""
    names = list(load_file(folder / WEIGHTS))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
    (folder / WEIGHTS).unlink()
    return folder / INDEX


def linked(folder: Path, target: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(target)


def pickled(folder: Path) -> None:
    torch.save({**load_file(folder / WEIGHTS), "x": Payload(folder / "ran")}, folder / "evil.bin")
    write_index(folder, "evil.bin")


def outside(folder: Path, named: str, link: bool = False) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "out.safetensors")
    write_index(folder, named)
    if link:
        (folder / named).symlink_to(folder.parent / "out.safetensors")


def piped(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def cut(folder: Path, to: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:to])


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def configured(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def more_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    last = max([*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])])
    tokenizer["added_tokens"] += [
        {"id": number, "content": f"<more {number}>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False}
        for number in range(last + 1, size + 2)
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


Attack = tuple[str, Callable[[Path], object], str]
ATTACKS: list[Attack] = [
    ("an index that names a pickle", pickled, "names 'evil.bin': only safetensors files in the folder itself"),
    ("an index that leads up", lambda at: outside(at, "../out.safetensors"), "names '../out.safetensors': only"),
    ("an index with an absolute path", lambda at: outside(at, str(at.parent / "out.safetensors")), "only safetensors files"),
    ("an index that names a link", lambda at: outside(at, "w.safetensors", True), "which links out of the folder"),
    ("an index of numbers", lambda at: write_index(at, 5), "names '5': only safetensors files"),
    ("an index of a missing file", lambda at: write_index(at, "w.safetensors"), "lacks w.safetensors; it holds"),
    ("an index of nothing", lambda at: write_index(at, "a").write_text("{}"), "has no weight_map"),
    ("an index that is a list", lambda at: write_index(at, "a").write_text("[1]"), "holds a list, not an"),
    ("an endless index", lambda at: write_index(at, "a").write_text("[" * 10**5), "is nested too deeply"),
    ("weights from a pipe", lambda at: piped(at, WEIGHTS), "model.safetensors is not a file, but"),
    ("a config from a pipe", lambda at: piped(at, "config.json"), "config.json"),
    ("weights of a device", lambda at: linked(at, "/dev/zero"), "is not a file"),
    ("weights cut in half", lambda at: cut(at, 60_000), "(60,000 bytes) is not a whole safetensors file"),
    ("weights cut in the header", lambda at: cut(at, 100), "(100 bytes) is not a whole safetensors file"),
    ("no bytes", lambda at: cut(at, 0), "(0 bytes) is not a whole safetensors file"),
    ("a header of 4 EB", lambda at: (at / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"x" * 99), "not a whole"),
    ("a missing weight", lambda at: changed(at, lambda w: w.pop(QUERY)), f"which would be random: {QUERY}"),
    ("another shape", lambda at: changed(at, lambda w: w.update({QUERY: torch.zeros(3, 5)})), f"{QUERY} has (3, 5) instead"),
    ("a config that is a list", lambda at: (at / "config.json").write_text("[]"), "config.json holds a list"),
    ("an endless config", lambda at: (at / "config.json").write_text('{"a":' * 10**5), "config.json is nested too deeply"),
    ("layers of text", lambda at: configured(at, num_hidden_layers="x"), "num_hidden_layers"),
    ("a billion layers", lambda at: configured(at, num_hidden_layers=10**9), "num_hidden_layers"),
    ("a type that is a list", lambda at: configured(at, model_type=["x"]), "unhashable"),
    ("a tokenizer cut short", lambda at: (at / "tokenizer.json").write_text('{"a":'), "tokenizer.json cannot be read"),
    ("an endless tokenizer", lambda at: (at / "tokenizer.json").write_text("[" * 10**6), "tokenizer.json is nested too"),
    ("another tokenizer", lambda at: (at / "tokenizer.json").write_text('{"model": 5}'), "tokenizer"),
    ("settings that are a list", lambda at: (at / "tokenizer_config.json").write_text("[]"), "holds a list"),
    ("a tokenizer larger than the embedding", more_tokens, "have none: save the model after"),
    (
        "an adapter beside the model",
        lambda at: (at / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}'),
        "would load the base that it names ('evil/base') in its place",
    ),
]  # fmt: skip


@pytest.mark.fault(
    "a model folder with an index that names a pickle or leads out, cut or missing weights, another shape, pipes, devices, "
    "endless JSON, a tokenizer that is too large",
    "refused by file in `check`, `run` and a trainer before weights are loaded; nothing runs",
)
@pytest.mark.parametrize(("name", "attack", "found"), ATTACKS, ids=[name for name, _, _ in ATTACKS])
def test_a_folder_of_strangers_is_refused(
    name: str, attack: Callable[[Path], object], found: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_path, folder, symlinks=False)
    attack(folder)
    source = {"generator": "arithmetic", "args": {"kind": "sft", "size": 2}}
    recipe = Recipe.parse(
        {"algorithm": "sft", "model": {"path": str(folder)}, "data": {"train": source}, "output_dir": str(tmp_path / "run")}
    )  # fmt: skip
    config = SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_check = "\n".join(map(str, check_recipe(recipe).faults))
        with pytest.raises(InputError) as before_run:
            check_before_run([recipe])
        with pytest.raises(InputError) as in_python:
            SFTTrainer(str(folder), args=config, train_dataset=[{"prompt": "a", "completion": "b"}])
    assert found in in_check
    assert found in str(before_run.value)
    if "an index of a missing file" not in name:  # transformers names that one
        assert found in str(in_python.value)
    assert not (folder / "ran").exists()


def test_a_snapshot_of_the_hub_links_to_its_blobs(tiny_model_path: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny_model_path, blobs)
    write_index(blobs, "w.safetensors")
    shutil.copy(tiny_model_path / WEIGHTS, blobs / "w.safetensors")
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    assert load_model(str(snapshot), SFTConfig()).num_parameters() > 0


def test_a_head_of_other_shape_is_not_made_anew(tiny_model_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_path, tmp_path / "model")
    width = json.loads((tmp_path / "model" / "config.json").read_text())["hidden_size"]
    changed(tmp_path / "model", lambda weights: weights.update({"score.weight": torch.zeros(3, width)}))
    with pytest.raises(ModelError, match="has a head of 3 labels, and a scalar head has one"):
        load_scalar(str(tmp_path / "model"))


def test_an_adapter_of_another_model_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    def policy(rank: int, targets: list[str]) -> Policy:
        settings = lora_config(LoraSettings(r=rank, target_modules=targets))
        return Policy(load_model(str(tiny_model_path), SFTConfig()), SFTConfig(), peft_config=settings)

    own = policy(4, ["q_proj"])
    for name, other in (("rank", policy(2, ["q_proj"])), ("targets", policy(4, ["q_proj", "v_proj"]))):
        other.save_adapter(tmp_path / name)
        with pytest.raises(ModelError, match="is an adapter for another model, or of other settings"):
            own.load_checkpoint(tmp_path / name)
    own.save_adapter(tmp_path / "own")
    own.load_checkpoint(tmp_path / "own")
    (path,) = (tmp_path / "own").rglob("adapter_model.safetensors")
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[:1] = float("nan")
    save_file(weights, path)
    with pytest.raises(ModelError, match="has weights with NaN or infinite numbers"):
        own.load_checkpoint(tmp_path / "own")


def uploaded(folder: Path, cache: Path, *attacks: Callable[[Path], object]) -> Path:
    """Lay a model out as the hub's cache does after a download of `owner/tiny`; return its snapshot."""
    commit, repository = "c" * 40, cache / "models--owner--tiny"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    for attack in attacks:
        attack(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place in (
        "huggingface_hub.constants",
        "transformers.utils.hub.constants",
        "huggingface_hub._snapshot_download.constants",
    ):
        monkeypatch.setattr(f"{place}.HF_HUB_CACHE", str(cache))


FROM_THE_HUB = [
    attack
    for attack in ATTACKS
    if attack[0] in ("an index that names a pickle", "an index of a missing file", "weights cut in half", "a missing weight",
                     "another shape", "an adapter beside the model", "a tokenizer larger than the embedding")
]  # fmt: skip


@pytest.mark.fault(
    "a model of the hub that is downloaded when it is loaded, with files as above",
    "refused by file after the download, before its weights are read; no other revision can be loaded",
)
@pytest.mark.parametrize(("name", "attack", "found"), FROM_THE_HUB, ids=[name for name, _, _ in FROM_THE_HUB])
def test_a_download_is_checked_before_its_weights_are_read(
    name: str,
    attack: Callable[[Path], object],
    found: str,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uploaded(tiny_model_path, tmp_path, attack)
    use_cache(tmp_path, monkeypatch)
    read = []
    kept = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        read.append(options.get("device_map"))
        return kept(cls, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    args = SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
    with pytest.raises(InputError) as caught:
        SFTTrainer("owner/tiny", args=args, train_dataset=[{"prompt": "a", "completion": "b"}])
    assert found.replace("; it holds", "; rlqwen loads no others") in str(caught.value)
    assert set(map(str, read)) <= {str({"": "meta"})}
    recipe = {"algorithm": "sft", "model": {"path": "owner/tiny"}, "output_dir": str(tmp_path / "run"),
              "data": {"train": {"generator": "arithmetic", "args": {"kind": "sft", "size": 2}}}}  # fmt: skip
    if "missing file" not in name:  # which may be yet to come
        with pytest.raises(InputError, match=re.escape(found)):
            check_before_run([Recipe.parse(recipe)])


def test_a_whole_model_of_the_hub_is_loaded_at_the_commit_that_was_checked(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = uploaded(tiny_model_path, tmp_path)
    use_cache(tmp_path, monkeypatch)
    asked = []
    kept = vision_language.auto_class

    def auto_class(config_class: Any) -> Any:
        class Recorded:
            @staticmethod
            def from_pretrained(name: str, **options: Any) -> Any:
                asked.append((name, options["revision"]))
                return kept(config_class).from_pretrained(name, **options)

        return Recorded

    monkeypatch.setattr(model_classes, "auto_class", auto_class)
    model = load_model("owner/tiny", SFTConfig())
    assert asked == [("owner/tiny", snapshot.name)] * 2
    assert model.config._name_or_path == "owner/tiny"
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="of the hub lacks weights as safetensors"):
        load_model("owner/tiny", SFTConfig())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scalar", [False, True])
def test_weights_that_are_no_numbers_are_refused_by_name(
    value: float, scalar: bool, tiny_model_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_path, tmp_path / "model")
    changed(tmp_path / "model", lambda weights: weights[QUERY].view(-1)[7:8].fill_(value))
    load = load_scalar if scalar else load_causal
    with pytest.raises(ModelError, match=f"has weights with NaN or infinite numbers.*{re.escape(QUERY)}"):
        load(str(tmp_path / "model"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_integers_without_their_scales_are_refused_by_name(
    dtype: torch.dtype, tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_path, folder)
    changed(folder, lambda weights: weights.update({QUERY: weights[QUERY].to(dtype)}))
    for refused in (load_causal, check_weights):
        with pytest.raises(ModelError, match=rf"{re.escape(QUERY)} \(.*has no quantization_config"):
            refused(str(folder))
    changed(
        folder,
        lambda weights: weights.update({QUERY: weights[QUERY].to(torch.float32), "position_ids": torch.arange(9)}),
    )
    load_causal(str(folder))
    check_weights(str(folder))


def packed(weights: dict[str, Any], layer: str) -> None:
    """Store a layer as GPTQ does: packed integers under other names."""
    weight = weights.pop(f"{layer}.weight")
    weights[f"{layer}.qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
    weights[f"{layer}.scales"] = torch.ones(1, weight.shape[0], dtype=torch.float16)


NORM, EMBEDDING, DOWN = (
    "model.layers.1.input_layernorm.weight",
    "model.embed_tokens.weight",
    "model.layers.1.mlp.down_proj",
)
OF_QUANTIZED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "whole": (lambda weights: None, ""),
    "a norm of other size": (lambda weights: weights.update({NORM: torch.ones(5)}), f"{NORM} has \\(5,\\) instead"),
    "no norm": (lambda weights: weights.pop(NORM), f"lacks weights, which would be random: {NORM}"),
    "an embedding of other size": (
        lambda weights: weights.update({EMBEDDING: weights[EMBEDDING][:7].clone()}), f"{EMBEDDING} has \\(7,"),
    "no layer": (
        lambda weights: [weights.pop(key) for key in list(weights) if key.startswith(DOWN)], f"random: {DOWN}.weight"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("case", OF_QUANTIZED)
def test_what_is_not_quantized_in_a_quantized_folder_is_compared(
    method: str, case: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    folder, (change, found) = tmp_path / "model", OF_QUANTIZED[case]
    shutil.copytree(tiny_model_path, folder)

    def quantize(weights: dict[str, Any]) -> None:
        for layer in [key.removesuffix(".weight") for key in weights if key.endswith("_proj.weight")]:
            if method == "gptq":
                packed(weights, layer)
            elif method == "bitsandbytes":
                size = weights[f"{layer}.weight"].numel()
                weights[f"{layer}.weight"] = torch.zeros(size // 2, 1, dtype=torch.uint8)
                weights[f"{layer}.weight.absmax"] = torch.ones(size // 64)
            else:
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"].to(torch.int8)
                weights[f"{layer}.weight_scale"] = torch.ones(weights[f"{layer}.weight"].shape[0], 1)

    changed(folder, quantize)
    changed(folder, change)
    configured(folder, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=found) if found else contextlib.nullcontext():
        check_weights(str(folder), to_train=False)
    if method != "bitsandbytes":
        with pytest.raises(ModelError, match=f"weights are quantized by '{method}'"):
            check_weights(str(folder))
