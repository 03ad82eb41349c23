"""The policy and its reference: one wrapper for every trainer.

    policy = Policy(load_model("Qwen/Qwen3-0.6B", args), args, peft_config=LoraConfig(...), reference=True)
    logp_N, entropy_N = policy.logprobs(batch, temperature=1.0)
    ref_logp_N = policy.reference_logprobs(batch)
    names_and_tensors = policy.export_weights()

Trained weights are float32 whatever the model's dtype: an optimiser at lr 1e-6 would lose its updates in bfloat16
rounding without a sign. Frozen ones keep theirs, quantised or not, norms included: Qwen's norms compute in float32
whatever they hold. With `bf16` the forward runs under autocast.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlqwen.adapters import (
    adapter_rank,
    adapter_weights,
    add_adapter,
    changes_base,
    check_adapter,
    checkpoint_weights,
    head_weight,
    lora_obstacle,
)
from rlqwen.attention import PACKED_ATTENTION
from rlqwen.batch import PackedBatch
from rlqwen.config import TrainerConfig
from rlqwen.errors import ModelError
from rlqwen.loading import saved_dtype
from rlqwen.logprobs import chunked_logprobs
from rlqwen.model_files import write_model
from rlqwen.quantization import prepare_quantized, quantized_bits, use_training_products

# Layers whose state runs through the sequence cannot see a prefix that lies elsewhere in the row.
PACKABLE_LAYERS = {"full_attention", "attention"}


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
            model: a transformers causal language model, its weights plain or bitsandbytes', or a PeftModel around one.
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
            _set_attention(self._reference)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        self.quantized_bits = quantized_bits(model)
        """4 or 8 with bitsandbytes weights; None with plain ones."""
        if self.quantized_bits:
            prepare_quantized(model)
        self.model: Any = model.to(self.device)
        self.has_adapter = isinstance(model, PeftModel)
        if self.has_adapter:
            check_adapter(self.model, reference=reference)
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
        self.packs_prefixes = packs_prefixes(self.base_model.config)
        _set_attention(self.base_model)
        self.model.train()

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model, adapters inside it where there are any."""
        return self.model.get_base_model() if self.has_adapter else self.model

    def has_base_of(self, folder: str) -> bool:
        """Whether what lies under the adapter is still what `folder`, which it was loaded from, holds."""
        if not self.has_adapter:
            return not self.quantized_bits
        changed = any(changes_base(config) for config in self.model.peft_config.values())
        return not (self.quantized_bits or changed) and saved_dtype(folder) == self.original_dtype

    def check_trainable(self) -> None:
        """ModelError if the weights are quantised and there is no adapter to train."""
        if self.quantized_bits and not self.has_adapter:
            raise ModelError(
                f"{self.quantized_bits}-bit weights cannot be trained themselves: give peft_config (model.lora in a "
                "recipe) to train an adapter on them, or load the model without quantization"
            )

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def logprobs(
        self, batch: PackedBatch, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(N,) float32 logprobs of the batch's targets in nats, and (N,) entropies where asked; with gradient."""
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
        if self.quantized_bits == 8:
            use_training_products(self.model)
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def _logprobs(
        self, model: PreTrainedModel, batch: PackedBatch, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            hidden_NC = _packed_hidden(model, batch) if self.packs_prefixes else _sequential_hidden(model, batch)
        return chunked_logprobs(
            hidden_NC.to(self.compute_dtype),
            head_weight(model),
            batch.target_N,
            temperature=temperature,
            chunk_size=self.chunk_size,
            entropy=entropy,
        )

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
            with (
                self.inference(),
                torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32),
            ):
                yield model
        finally:
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            _set_attention(model)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its checkpoint name, adapters merged, tied heads included, in the compute dtype.

        These are the names that vLLM loads: mixture-of-experts weights go back from transformers' fused form, and
        `lm_head.weight` is there for tied models too, without which vLLM would keep its old head.
        """
        return checkpoint_weights(self.base_model, dtype=self.compute_dtype)

    @property
    def lora_obstacle(self) -> str | None:
        """Why rollout workers cannot be sent the adapter alone; None if they can."""
        return lora_obstacle(self.model) if self.has_adapter else "there is no adapter"

    @property
    def lora_rank(self) -> int:
        """The largest rank of the adapter."""
        return adapter_rank(self.model)

    def export_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """The adapter's weights under PEFT's names, scaling folded in."""
        return adapter_weights(self.model)

    def save(self, folder: Path | str, *, dtype: torch.dtype | None = None, adapter: bool = True) -> None:
        """Write a folder that `from_pretrained` loads, of plain weights, adapters merged or (`adapter` False) left out.

        `dtype` None keeps each weight's own.
        """
        with contextlib.nullcontext() if adapter or not self.has_adapter else self._adapter_off():
            write_model(folder, self.base_model, checkpoint_weights(self.base_model, dtype=dtype))

    def save_adapter(self, folder: Path | str) -> None:
        """Write the adapter alone, as PEFT loads it; without the base's embedding, which it leaves as it was."""
        self.model.save_pretrained(folder, save_embedding_layers=False)

    def restore(self, folder: Path | str) -> None:
        """Load what `save` (or, with an adapter, `save_adapter`) wrote back into the trained weights."""
        if self.has_adapter:
            set_peft_model_state_dict(self.model, load_peft_weights(str(folder)))
            return
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.base_model.load_state_dict(saved.state_dict())


def packs_prefixes(config: Any) -> bool:
    """Whether a model of this configuration can share a prefix; linear, recurrent or sliding layers cannot."""
    layers = getattr(config, "layer_types", None)
    return layers is None or set(layers) <= PACKABLE_LAYERS


def _set_attention(model: PreTrainedModel) -> None:
    if packs_prefixes(model.config):
        model.set_attn_implementation(PACKED_ATTENTION)


def _packed_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """(N, C) hidden states that predict the targets, from one forward over the packed row."""
    output = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, layout=batch.layout, use_cache=False
    )
    return output.last_hidden_state[0][batch.source_N]


def _sequential_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """(N, C) as above, prefix and branch forwarded again for each sequence: for layers that carry a state along."""
    hidden = []
    for sequence, span in enumerate(batch.layout.spans):
        prefix = batch.input_ids[:, span.prefix_start : span.prefix_end]
        branch = batch.input_ids[:, span.start : span.end]
        source = batch.source_N[batch.sequence_N == sequence]
        if not len(source):
            continue
        output = model.base_model(input_ids=torch.cat([prefix, branch], dim=1), use_cache=False)
        inside = source - span.start + prefix.shape[1]
        hidden.append(output.last_hidden_state[0][torch.where(source < span.start, prefix.shape[1] - 1, inside)])
    return torch.cat(hidden)
