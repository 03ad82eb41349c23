"""Write parts of a real checkpoint that transformers' classes do not write: multi-token prediction, image processor."""

import json
import re
from pathlib import Path

from rlqwen.models.tiny.configs import MERGE_SIZE, PATCH_SIZE

_MEAN_AND_DEVIATION = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_PATCHES = {"patch_size": PATCH_SIZE, "temporal_patch_size": 2, "merge_size": MERGE_SIZE}
# Pixels; the smallest and the largest image take 1 and 64 tokens.
_SIZE = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}


def add_mtp_weights(folder: Path, seed: int, scale: float) -> None:
    """Add weights for multi-token prediction to the folder's one weight file, under their names in Qwen's checkpoints.

    Their layer has the names and shapes of the model's last layer of full attention. All are drawn with standard
    deviation `scale`, norms too, so that no tensor is trivial; the global random state is left alone.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    layers = [re.match(r"(model\.(?:language_model\.)?layers\.(\d+)\.)self_attn\.", name) for name in weights]
    prefix = max((int(match[2]), match[1]) for match in layers if match)[1]
    shapes = {name.replace(prefix, "mtp.layers.0."): w.shape for name, w in weights.items() if name.startswith(prefix)}
    hidden = weights[f"{prefix}input_layernorm.weight"].shape[0]
    shapes["mtp.fc.weight"] = torch.Size([hidden, 2 * hidden])
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        shapes[f"mtp.{norm}.weight"] = torch.Size([hidden])
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shapes[name], generator=generator) * scale for name in sorted(shapes)}
    save_file(weights | drawn, file, metadata={"format": "pt"})


def write_processor_files(folder: Path) -> None:
    """Write the configs of the image and video processors, of Qwen3-VL's kind, for small images."""
    processors = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, kind in processors.items():
        fields = {"size": _SIZE, "processor_class": "Qwen3VLProcessor"} | kind | _PATCHES | _MEAN_AND_DEVIATION
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
