"""Export a model: merge its adapter, cast, shard, quantize to int8 if asked, with tokenizer and model card.

    export_model(ExportOptions(source="runs/gsm8k", destination="out", dtype="bfloat16"))

Weights go from the loaded model to the files one shard at a time, so that memory holds them once.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from rlqwen.config.usable_values import real_path
from rlqwen.errors import ConfigError, ModelError
from rlqwen.models.adapters import VLLM_PROJECTIONS, check_adapter
from rlqwen.models.carried_weights import carried_by
from rlqwen.models.hub import SAFE, check_vocabulary, refuse_pickles
from rlqwen.models.loading import align_stop_tokens, load_generation_config, local_folder
from rlqwen.models.merged_weights import checkpoint_weights
from rlqwen.models.model_classes import load_causal, load_scalar
from rlqwen.models.quantization import prepare_quantized, quantized_bits, require_bitsandbytes
from rlqwen.models.weight_files import write_model
from rlqwen.preflight import check_model_path
from rlqwen.run_folder.layout import FINAL_FOLDER, RECIPE_FILE
from rlqwen.runs.model_card import write_card
from rlqwen.terminal import warn

_ADAPTER_CONFIG = "adapter_config.json"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_INT8_ARGUMENTS = {"num_bits": 8, "type": "int", "symmetric": True}


@dataclass(frozen=True)
class ExportOptions:
    """The options of `rlqwen export`."""

    source: str
    """Run folder, checkpoint, model folder or hub id, or adapter folder."""
    destination: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """None keeps the dtype of each weight; with an adapter, that of the base."""
    shard_size: str = "5GB"
    int8: bool = False
    base: str | None = None
    """Base model of an adapter; None: the one that its config names."""


@dataclass(frozen=True)
class Source:
    """The places of the parts of a model to export."""

    model: str
    """Folder with config and weights."""
    adapter: Path | None
    tokenizer: str
    run: Path | None
    """The run folder that the model lies in, if any."""


def export_model(options: ExportOptions) -> int:
    """Write the folder `destination`, whole or not at all; return the bytes of its weights.

    Raises ConfigError for a destination that is not empty, ModelError for a source that cannot be read.
    """
    destination = Path(options.destination).expanduser()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{options.destination!r} exists and is not an empty folder; give another destination")
    shard_bytes = parse_size(options.shard_size)
    source = find_source(options.source, options.base)
    model = _load(source)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=False)
    check_vocabulary(tokenizer, base.config, f"{source.model} with the tokenizer of {source.tokenizer}")
    if source.adapter is not None:
        base.generation_config = load_generation_config(source.tokenizer) or base.generation_config
        align_stop_tokens(base, tokenizer)
    if options.int8 and getattr(base.config.get_text_config(), "num_experts", None):
        raise ModelError(f"{options.source!r} is a mixture of experts; int8 is written for dense models only")
    weights = checkpoint_weights(base, dtype=getattr(torch, options.dtype) if options.dtype else None)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        num_bytes = write_model(
            partial,
            base,
            int8_weights(weights) if options.int8 else weights,
            max_shard_bytes=shard_bytes,
            quantization=_int8_config(base) if options.int8 else None,
        )
        tokenizer.save_pretrained(partial)
        left = _left_by_int8(base) if options.int8 else None
        if left is not None:
            warn(left, stacklevel=2)
        write_card(partial, run=source.run, base=source.model, int8=options.int8, note=left)
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return num_bytes


def find_source(name: str, base: str | None = None) -> Source:
    """Return what `name` stands for: a run's `final/` or newest checkpoint, a model, or an adapter with its base."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / _ADAPTER_CONFIG).is_file():
            return _adapter_source(folder, base)
        checkpoints = sorted(folder.glob("checkpoints/step-*"))
        inner = [path for path in (folder / FINAL_FOLDER, *reversed(checkpoints)) if path.is_dir()]
        if not inner:
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
            raise ModelError(f"{name!r} holds no finished run, model or adapter; it holds {found}")
        return find_source(str(inner[0]), base)
    if base is not None:
        raise ConfigError(f"--base is for adapters, and {name!r} is a whole model")
    check_model_path(name)
    model = local_folder(name)
    return Source(model, None, model, _run_of(folder))


def _adapter_source(folder: Path, base: str | None) -> Source:
    named = json.loads((folder / _ADAPTER_CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    base = base or named
    if not base:
        raise ModelError(f"adapter {str(folder)!r} does not name its base model; give it with --base")
    try:
        check_model_path(base)
        model = local_folder(base)
    except ModelError as error:
        raise ModelError(
            f"adapter {str(folder)!r}: its base cannot be used ({error}); give another with --base"
        ) from None
    nearby = [place for place in (folder, folder.parent) if (place / "tokenizer_config.json").is_file()]
    return Source(model, folder, str(nearby[0]) if nearby else model, _run_of(folder))


def _run_of(folder: Path) -> Path | None:
    """Return the run folder that `folder` lies in, as deep as `run/final/adapter`."""
    places = [real_path(folder), *real_path(folder).parents][:4]
    return next((place for place in places if (place / RECIPE_FILE).is_file()), None)


def _load(source: Source) -> Any:
    try:
        config = AutoConfig.from_pretrained(source.model, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            require_bitsandbytes(f"the quantized model {source.model!r}")
        scores = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        arguments: dict[str, Any] = {"dtype": "auto", **SAFE}
        model: Any = load_scalar(source.model, **arguments)[0] if scores else load_causal(source.model, **arguments)
        if quantized_bits(model):
            prepare_quantized(model)
        if source.adapter is not None:
            refuse_pickles(source.adapter)
            model = PeftModel.from_pretrained(model, str(source.adapter))
            check_adapter(model, reference=False)
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        what = source.model if source.adapter is None else f"{source.adapter} on {source.model}"
        raise ModelError(f"{what} cannot be loaded: {error}") from error
    return model.eval()


def int8_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield projections as int8 with a scale per output channel, in compressed-tensors' layout, and the rest as it is.

    weight = round(w / scale), scale = max |w| of the row / 127.
    """
    for name, tensor in weights:
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module.rpartition(".")[2] not in VLLM_PROJECTIONS:
            yield name, tensor
            continue
        scale = tensor.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        yield name, (tensor.float() / scale).round().to(torch.int8)
        yield f"{module}.weight_scale", scale.to(tensor.dtype)


def _int8_config(model: nn.Module) -> dict[str, Any]:
    """Return the quantization config for transformers and vLLM: int8 weights, and activations rounded per token."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plain = [name for name in linear if name.rpartition(".")[2] not in VLLM_PROJECTIONS]
    if carried := carried_by(model):  # the folder is of a class that has other modules, and other names for them
        leaves = sorted({name.rpartition(".")[2] for name in plain})
        others = sorted({name.removeprefix("model.").partition(".")[0] for name in carried.weights})
        plain = [rf"re:(.*\.)?{leaf}$" for leaf in leaves] + [rf"re:(model\.)?{other}\..*" for other in others]
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": plain,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _INT8_ARGUMENTS | {"strategy": "channel", "dynamic": False},
                "input_activations": _INT8_ARGUMENTS | {"strategy": "token", "dynamic": True},
            }
        },
    }


def _left_by_int8(model: nn.Module) -> str | None:
    """Return which projections `int8_weights` leaves as they are, such as those of delta-net layers; None if none."""
    projections = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    left = {name: size for name, size in projections.items() if name.rpartition(".")[2] not in VLLM_PROJECTIONS}
    if not left:
        return None
    names = ", ".join(sorted({name.rpartition(".")[2] for name in left}))
    share = sum(left.values()) / sum(projections.values())
    return f"not in int8, but as they were: {names} ({share:.0%} of the projections' parameters)"


def parse_size(text: str) -> int:
    """Return the bytes of `5GB`, `500MB`, ...; ConfigError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"shard size {text!r} is no size; write it as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
