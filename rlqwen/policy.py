"""The policy and its reference: one wrapper for every trainer.

    policy = Policy(load_model("Qwen/Qwen3-0.6B", args), args, peft_config=LoraConfig(...), reference=True)
    logp_N, entropy_N = policy.logprobs(batch, temperature=1.0)
    ref_logp_N = policy.reference_logprobs(batch)
    names_and_tensors = policy.export_weights()

Trained weights are float32 whatever the model's dtype: an optimiser at lr 1e-6 would lose its updates in bfloat16
rounding without a sign. With `bf16` the forward runs under autocast.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlqwen.batch import PackedBatch
from rlqwen.config import TrainerConfig
from rlqwen.errors import ModelError
from rlqwen.hidden import hidden_states, use_packed_attention
from rlqwen.logprobs import chunked_logprobs


class Policy:
    """A causal language model, its frozen reference, and the packed forward that both share."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainerConfig,
        *,
        peft_config: Any = None,
        reference: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take over `model`; it is changed in place.

        Args:
            model: a transformers causal language model, or a PeftModel around one.
            peft_config: a peft.LoraConfig; None trains all weights (or the PeftModel's adapter).
            reference: whether `reference_logprobs` will be asked for. With adapters it is the model with the adapter
                off, else a frozen copy of the weights as given.
        """
        self.device = torch.device(device)
        self.chunk_size = args.logprob_chunk_size
        self.original_dtype: torch.dtype = model.dtype
        self.compute_dtype = torch.bfloat16 if self._wants_bf16(args) else torch.float32
        self._reference: nn.Module | None = None
        if reference and peft_config is None and not isinstance(model, PeftModel):
            self._reference = copy.deepcopy(model).to(self.device, self.compute_dtype).eval().requires_grad_(False)
            use_packed_attention(self._reference)
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise ModelError("the model has an adapter already: leave out peft_config, or merge the adapter first")
            model = get_peft_model(model, peft_config)
        self.model: Any = model.to(self.device)
        self.has_adapter = isinstance(model, PeftModel)
        self.has_reference = reference
        self._prepare_training(args)

    def _wants_bf16(self, args: TrainerConfig) -> bool:
        if args.bf16 is not None:
            return args.bf16
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported()

    def _prepare_training(self, args: TrainerConfig) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        checkpointing = args.gradient_checkpointing
        if checkpointing if checkpointing is not None else self.device.type == "cuda":
            self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.has_adapter:
                self.base_model.enable_input_require_grads()
        if args.disable_dropout:
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        use_packed_attention(self.base_model)
        self.model.train()

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model, adapters inside it where there are any."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def logprobs(
        self, batch: PackedBatch, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(N,) float32 logprobs of the batch's targets in nats, and (N,) entropies where asked; with gradient."""
        return self.logprobs_and_hidden(batch, temperature=temperature, entropy=entropy)[:2]

    def logprobs_and_hidden(
        self, batch: PackedBatch, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `logprobs`, and the (N, C) hidden states that they come from, for a head on the same trunk."""
        return self._logprobs(self.base_model, batch, temperature, entropy)

    @torch.no_grad()
    def reference_logprobs(self, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
        """(N,) float32 logprobs under the reference, without gradient."""
        if not self.has_reference:
            raise ValueError("this policy was made without a reference")
        model = self.base_model if self._reference is None else self._reference
        with self.inference(), self._adapter_off() if self._reference is None else contextlib.nullcontext():
            return self._logprobs(model, batch, temperature, False)[0]

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients and no dropout inside."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def _logprobs(
        self, model: PreTrainedModel, batch: PackedBatch, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        with self.autocast():
            hidden_NC = hidden_states(model, batch, batch.source_N, batch.sequence_N)
        logp_N, entropy_N = chunked_logprobs(
            hidden_NC.to(self.compute_dtype),
            _head_weight(model),
            batch.target_N,
            temperature=temperature,
            chunk_size=self.chunk_size,
            entropy=entropy,
        )
        return logp_N, entropy_N, hidden_NC

    def autocast(self) -> torch.autocast:
        """The forward's precision."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def _adapter_off(self) -> contextlib.AbstractContextManager[None]:
        return self.model.disable_adapter()

    @torch.no_grad()
    def refresh_reference(self, alpha: float) -> None:
        """Mix the policy into the reference: reference = alpha * policy + (1 - alpha) * reference."""
        if self._reference is None:
            raise ValueError("only a reference that is a copy of the weights can be refreshed")
        for ours, theirs in zip(self.model.parameters(), self._reference.parameters(), strict=True):
            theirs.lerp_(ours.to(theirs.dtype), alpha)

    @contextlib.contextmanager
    def generation_model(self) -> Iterator[PreTrainedModel]:
        """The model as `generate` wants it: in eval mode, with ordinary attention, without gradients."""
        model = self.base_model
        checkpointing = model.is_gradient_checkpointing
        model.set_attn_implementation("sdpa")
        if checkpointing:
            model.gradient_checkpointing_disable()
        try:
            with self.inference(), self.autocast():
                yield model
        finally:
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            use_packed_attention(model)

    @torch.no_grad()
    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its checkpoint name, adapters merged, tied heads included, in the compute dtype.

        These are the names that vLLM loads: mixture-of-experts weights go back from transformers' fused form, and
        `lm_head.weight` is there for tied models too, without which vLLM would keep its old head.
        """
        with self._merged():
            for name, tensor in revert_weight_conversion(self.base_model, self._plain_weights()).items():
                yield name, tensor.detach().to(self.compute_dtype)

    def _plain_weights(self) -> dict[str, Tensor]:
        """The base model's state under the names it had before PEFT wrapped its modules."""
        return {
            _plain_name(name): tensor
            for name, tensor in self.base_model.state_dict().items()
            if ".lora_" not in name and ".original_module." not in name
        }

    @contextlib.contextmanager
    def _merged(self) -> Iterator[None]:
        """Adapters added into the base weights; the base weights come back bit for bit, as saved, not subtracted."""
        if not self.has_adapter:
            yield
            return
        layers = [module for module in self.base_model.modules() if hasattr(module, "get_delta_weight")]
        saved = [layer.get_base_layer().weight.data for layer in layers]
        try:
            for layer in layers:
                weight = layer.get_base_layer().weight
                delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
                weight.data = (weight.data.float() + delta.float()).to(weight.dtype)
            yield
        finally:
            for layer, weight in zip(layers, saved, strict=True):
                layer.get_base_layer().weight.data = weight

    def save(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `from_pretrained` loads, adapters merged; `dtype` None keeps each weight's own."""
        with self._merged():
            weights = {
                name: tensor if dtype is None else tensor.to(dtype) for name, tensor in self._plain_weights().items()
            }
            self.base_model.save_pretrained(folder, state_dict=weights)

    def save_adapter(self, folder: Path | str) -> None:
        """Write the adapter alone, as PEFT loads it."""
        self.model.save_pretrained(folder)

    def restore(self, folder: Path | str) -> None:
        """Load what `save` (or, with an adapter, `save_adapter`) wrote back into the trained weights."""
        if self.has_adapter:
            set_peft_model_state_dict(self.model, load_peft_weights(str(folder)))
            return
        saved = type(self.base_model).from_pretrained(folder, dtype=torch.float32)
        self.base_model.load_state_dict(saved.state_dict())


def _head_weight(model: PreTrainedModel) -> Tensor:
    """(V, C) weight of the head, with its adapter where it has one."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]] if not head.disable_adapters else head.original_module
    if hasattr(head, "get_delta_weight"):
        weight = head.get_base_layer().weight
        if head.disable_adapters:
            return weight
        return weight + sum(head.get_delta_weight(adapter) for adapter in head.active_adapters)
    return head.weight


def _plain_name(name: str) -> str:
    """A parameter's name as it was before PEFT wrapped its module."""
    name = name.replace(".base_layer.", ".")
    parts = name.split(".modules_to_save.")
    return parts[0] + "." + parts[1].split(".", 1)[1] if len(parts) == 2 else name
