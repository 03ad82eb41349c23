"""Hold the frozen model that a policy is compared with, if it is a model of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors
from torch import nn
from transformers import PreTrainedModel

from rlqwen.distributed import gathered
from rlqwen.models.gpu_forward import speed_up_on_gpu
from rlqwen.models.model_support import check_config, check_head
from rlqwen.models.quantization import prepare_quantized, quantized_bits, use_training_products
from rlqwen.models.root import Root
from rlqwen.models.text_only import text_only
from rlqwen.packing.forward import use_packed_attention

REFERENCE_FILE = "reference.safetensors"


class FrozenReference:
    """Hold a frozen model in the dtype of the forward."""

    def __init__(self, model: Any, *, device: torch.device, dtype: torch.dtype, sharded: bool) -> None:
        """Take over `model`, which is changed in place.

        Args:
            dtype: of the forward.
            sharded: whether all ranks share its weights (FSDP2); they then call this together.
        """
        model = text_only(model.get_base_model() if isinstance(model, PeftModel) else model)
        check_config(model.config)
        check_head(model)
        is_quantized = bool(quantized_bits(model))
        if is_quantized:
            prepare_quantized(model)
        loaded = Root.of(model)
        model = (model.to(device) if loaded or not sharded else model).eval().requires_grad_(False)
        if is_quantized:
            use_training_products(model)
        elif loaded is None:
            _cast_as_autocast(model, dtype)
        elif dtype == torch.float32:
            loaded.float()  # a half-precision forward casts what it gathers
        use_packed_attention(model)
        speed_up_on_gpu(model)
        self.model: PreTrainedModel = model
        self._root = loaded or Root(model)
        if sharded and not loaded:
            self._root.shard(device=device, dtype=dtype)

    def __call__(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Return `compute(*arguments)`, which may read the weights; with sharded ones on all ranks together."""
        return self._root(compute, *arguments)

    @torch.no_grad()
    def mix(self, policy: nn.Module, alpha: float) -> None:
        """Mix another model of the same weights in: reference = alpha * policy + (1 - alpha) * reference."""
        mixed: set[int] = set()
        for ours, theirs in zip(self.model.modules(), policy.modules(), strict=True):
            new = {name: id(weight) for name, weight in ours._parameters.items() if id(weight) not in mixed}
            with gathered([ours], modify=True), gathered([theirs]):
                for name, weight in ours.named_parameters(recurse=False):
                    if name in new:  # a tied weight has two places
                        weight.lerp_(theirs.get_parameter(name).to(weight.dtype), alpha)
            mixed.update(new.values())

    def save(self, folder: Path, *, write: bool) -> None:
        """Write the weights into `folder`; call it on every rank, with `write` on one."""
        with gathered(self.model.modules()):
            if write:
                folder.mkdir(parents=True, exist_ok=True)
                save_safetensors(self.model, str(folder / REFERENCE_FILE))

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote."""
        with gathered(self.model.modules(), modify=True):
            load_safetensors(self.model, str(folder / REFERENCE_FILE))


def _cast_as_autocast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast to `dtype`, in place, the weights that autocast would cast.

    In half precision vectors, such as the decay rates of delta-net layers, keep their dtype, and so do buffers: rounded
    frequencies of rotary embeddings would turn distant tokens by whole radians.
    """
    for weight in model.parameters():
        if weight.ndim > 1 or dtype == torch.float32:
            weight.data = weight.data.to(dtype)
