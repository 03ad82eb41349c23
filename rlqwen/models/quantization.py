"""Load 4- and 8-bit base weights through bitsandbytes, and turn them into plain weights.

Quantized weights are frozen; adapters on top of them are trained (QLoRA, arXiv 2305.14314). bitsandbytes has kernels
for the CPU too. It is an optional extra, imported only if a model needs it.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from rlqwen.config import QuantizationSettings
from rlqwen.errors import ModelError


def require_bitsandbytes(what: str) -> None:
    """Raise ModelError if bitsandbytes, which `what` needs, is missing, with the command that installs it."""
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"{what} needs bitsandbytes, which is not installed: pip install 'rlqwen[quantization]'")


def bitsandbytes_config(settings: QuantizationSettings) -> BitsAndBytesConfig:
    """Return transformers' config of a recipe's `model.quantization`."""
    require_bitsandbytes("model.quantization")
    if settings.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = settings.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def quantized_bits(model: nn.Module) -> int | None:
    """Return 4 or 8 for a model with bitsandbytes weights, None for plain ones; ModelError for another method."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    refuse_foreign_quantization(settings)
    return 4 if getattr(model, "is_loaded_in_4bit", False) else 8


def refuse_foreign_quantization(settings: Any) -> None:
    """Raise ModelError if a config's entry on quantization, None for plain weights, is of another method than
    bitsandbytes', or if that is not installed."""
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    method = getattr(method, "value", method)
    if method != "bitsandbytes":
        raise ModelError(
            f"the model's weights are quantized by {method!r}; rlqwen works on plain weights or those of bitsandbytes: "
            "start from the unquantized model, with model.quantization if memory is short"
        )
    require_bitsandbytes("a model whose weights are quantized")


def prepare_quantized(model: nn.Module) -> None:
    """Keep weights in the layout that training, merging and saving read, and silence warnings of bitsandbytes."""
    # It says at every product of 8-bit weights that the input is cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    module: Any
    for module in model.modules():
        if is_quantized(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first forward in eval mode repacks the weights for inference, in place.
            module.support_avx512bf16_for_cpu = False
        conversions = module.__dict__.get("_weight_conversions")
        if conversions:
            # Those from a quantized checkpoint have no way back, and plain weights need none.
            module._weight_conversions = [step for step in conversions if not _reads_quantized(step)]


def _reads_quantized(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any(type(operation).__name__ in ("Bnb4bitDeserialize", "Bnb8bitDeserialize") for operation in operations)


def use_training_products(model: nn.Module) -> None:
    """Let 8-bit layers in eval mode compute products as in training.

    On CPU they would round the activations to 8 bits too, and logprobs would depend on the mode.
    """
    for module in model.modules():
        if is_8bit(module):
            module.training = True


def is_8bit(module: nn.Module) -> bool:
    """Return whether the module's weight is an 8-bit one of bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ == "Int8Params"


def is_quantized(module: nn.Module) -> bool:
    """Return whether the module's weight is a quantized one of bitsandbytes."""
    return is_8bit(module) or type(getattr(module, "weight", None)).__name__ == "Params4bit"


def dequantized_weight(module: Any) -> Tensor:
    """Return the (out, in) plain weight of a quantized linear layer: float16 or float32 from 8 bits, else the original
    dtype."""
    from bitsandbytes import functional

    weight = module.weight
    if not is_8bit(module):
        plain: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return plain
    # The scales move from the weight to the layer's state at the first forward.
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))  # type: ignore[no-any-return]
