"""Choose what an engine serves of a model's folder: weights, dtype, and the text part of a model with vision.

vLLM's class for the whole of a Qwen3.5 wants a multimodal processor and memory for a vision tower that rollouts of text
never use. So engines start from a view of the folder: the config of the text part, and links to the weight files.
"""

import json
from pathlib import Path
from typing import Any

from rlqwen.config import RolloutConfig
from rlqwen.errors import ConfigError
from rlqwen.models.hub import is_tied, read_config

TEXT_CLASSES = {"qwen3_5": "Qwen3_5ForCausalLM", "qwen3_5_moe": "Qwen3_5MoeForCausalLM"}
"""`model_type` of a config with a text part -> vLLM's class for that part."""
_DELTA_NET_TYPES = {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"}
_CPU_HEAD_DIMS = (64, 128)
"""Sizes of a gated delta-net head that vLLM's CPU kernels have."""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that describes the language model."""
    part: dict[str, Any] = config.get("text_config") or config
    return part


def engine_dtype(config: RolloutConfig, model_path: str, compute_dtype: str, *, on_gpu: bool) -> tuple[str, str | None]:
    """Choose the dtype of vLLM's engines; return it, and what to say where it is not the trainer's.

    `compute_dtype`: the trainer's. Raises ConfigError where vLLM's kernels cannot compute the model.
    """
    asked = config.dtype
    dtype = compute_dtype if asked == "auto" else asked
    model = read_config(model_path)
    if on_gpu or model.get("model_type") not in _DELTA_NET_TYPES:
        return dtype, None
    text = text_config(model)
    sizes = {name: text.get(name, 128) for name in ("linear_key_head_dim", "linear_value_head_dim")}
    for name, size in sizes.items():
        if size not in _CPU_HEAD_DIMS:
            raise ConfigError(
                f"{model_path}: {name} is {size}, and vLLM's CPU kernels for gated delta-net layers have heads of 64 or "
                "128 only; set rollout.engine to transformers, or sample on a GPU"
            )
    if dtype == "bfloat16":
        return dtype, None
    if asked != "auto":
        raise ConfigError(
            f"rollout.dtype is {asked}, but vLLM's CPU kernels for the gated delta-net layers of {model_path} compute in "
            "bfloat16 only; leave rollout.dtype out, or set rollout.engine to transformers"
        )
    return "bfloat16", (
        f"rollout workers compute in bfloat16, not the policy's {dtype}: vLLM's CPU kernels for gated delta-net layers "
        "have no other"
    )


def is_qwen3_5(folder: Path) -> bool:
    """Return whether the folder's config is of the text of a Qwen3.5, 3.6 or 3.8, which one class computes."""
    return bool(set(read_config(folder).get("architectures") or ()) & set(TEXT_CLASSES.values()))


def text_view(folder: Path, view: Path) -> Path:
    """Make the folder `view` of the text part of the model in `folder`, and return it; return `folder` itself where
    that is text alone."""
    config = read_config(folder)
    text_class = TEXT_CLASSES.get(config.get("model_type", ""))
    if text_class is None or "text_config" not in config:
        return folder
    part = config["text_config"]
    part["tie_word_embeddings"] = is_tied(config)
    part |= {"architectures": [text_class], "model_type": f"{config['model_type']}_text"}
    if "quantization_config" in config:
        part["quantization_config"] = config["quantization_config"]
    view.mkdir()
    (view / "config.json").write_text(json.dumps(part), "utf-8")
    for path in folder.iterdir():
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            (view / path.name).symlink_to(path.absolute())
    return view
