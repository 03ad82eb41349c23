"""Replace the LoRA adapter that a vLLM engine applies to its base model."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM's kernels are laid out for."""
_FILE = "adapter_model.safetensors"


class ServedAdapter:
    """Hold the adapter of an engine, one at a time."""

    def __init__(self, rank: int) -> None:
        """Load adapters of `rank`."""
        self.request: LoRARequest | None = None
        """What every request is drawn with; None: the base model."""
        self._rank = rank

    def replace(self, llm: Any, weights: dict[str, torch.Tensor], version: int) -> None:
        """Load an adapter, whose scaling is folded into the weights, and remove the one before.

        It has a name and an id of its own, because vLLM's caches go by these.
        """
        number = 1
        if self.request is not None:
            number = self.request.lora_int_id + 1
            llm.remove_lora(self.request.lora_int_id)
        modules = sorted({weight.rsplit(".", 3)[1] for weight in weights})
        config = {"peft_type": "LORA", "r": self._rank, "lora_alpha": self._rank, "target_modules": modules}
        with tempfile.TemporaryDirectory(prefix="rlqwen-adapter-") as folder:
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
            save_file({weight: tensor.clone() for weight, tensor in weights.items()}, Path(folder) / _FILE)
            self.request = LoRARequest(f"version-{version}-{number}", number, folder)
            llm.add_lora(self.request)
