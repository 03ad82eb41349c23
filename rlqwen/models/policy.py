"""Wrap a policy and its reference, for every trainer.

policy = Policy(load_model("Qwen/Qwen3-0.6B", args), args, peft_config=LoraConfig(...), reference=True)
logp_N, entropy_N = policy.logprobs(batch, temperature=1.0)
ref_logp_N = policy.reference_logprobs(batch)
names_and_tensors = policy.export_weights()
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlqwen.config import TrainerConfig
from rlqwen.distributed import on_all_ranks, whole_model
from rlqwen.errors import ConfigError
from rlqwen.models.adapters import adapter_rank, adapter_weights, check_adapter, lora_obstacle
from rlqwen.models.frozen_reference import FrozenReference
from rlqwen.models.merged_weights import checkpoint_weights, head_weight
from rlqwen.models.model_support import check_head
from rlqwen.models.packed_model import PackedModel
from rlqwen.models.recomputation import recompute_activations
from rlqwen.models.text_only import text_only
from rlqwen.packing.batch import PackedBatch
from rlqwen.packing.divergence import chunked_kl
from rlqwen.packing.forward import hidden_states, own_attention
from rlqwen.packing.logprobs import chunked_log_sum_sq_probs, chunked_logprobs, scaled_logits
from rlqwen.packing.routing_replay import RoutingReplay
from rlqwen.packing.sequence_parallel import SequenceGroup
from rlqwen.packing.truncation import chunked_log_kept
from rlqwen.types import Truncation

_NOT_OF_THE_BASE = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
"""Parts that PEFT's wrappers insert into the names of the weights under them."""


class Policy(PackedModel):
    """A causal language model, its frozen reference, and the packed forward that both share."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainerConfig,
        *,
        peft_config: Any = None,
        reference: bool | nn.Module = False,
        device: torch.device | str = "cpu",
        sequence: SequenceGroup | None = None,
    ) -> None:
        """Take over `model`; it is changed in place.

        Args:
            model: a causal language model, or a PeftModel around one.
            peft_config: a peft.LoraConfig; None trains all weights (or the PeftModel's adapter).
            reference: whether `reference_logprobs` will be asked for, or the model to ask, which is frozen. True is the
                model as given: with a new adapter that is the model with the adapter off, else a frozen copy.
        """
        model = text_only(model)
        if reference is True and peft_config is None and not _has_new_adapter(model):
            reference = copy.deepcopy(model)  # as it is now: what follows changes it in place
        super().__init__(model, args, peft_config=peft_config, device=device, sequence=sequence)
        self.chunk_size = args.logprob_chunk_size
        self.has_reference = bool(reference)
        self._reference: FrozenReference | None = None
        if isinstance(reference, nn.Module):
            self._reference = FrozenReference(
                reference, device=self.device, dtype=self.compute_dtype, sharded=self.shards_weights
            )
        if self.has_adapter:
            check_adapter(self.model, reference=self.has_reference and self._reference is None)
        check_head(self.base_model)
        self._check_forward(self._logits, lambda ids: self.base_model(input_ids=ids, use_cache=False).logits)

    def replay_routing(self) -> None:
        """Have policy and reference choose the experts that a batch has recorded; ConfigError for a dense model.

        The reference too: else its KL to the policy would count tokens that the two send to other experts by rounding.
        """
        self.replay = RoutingReplay(self.base_model)
        if self._reference is not None:
            RoutingReplay(self._reference.model)

    def _logits(self, hidden_RC: Tensor) -> Tensor:
        return scaled_logits(hidden_RC, head_weight(self.base_model).to(hidden_RC.dtype), 1.0)

    @on_all_ranks("forward")
    def logprobs(
        self,
        batch: PackedBatch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        truncation: Truncation | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (N,) float32 logprobs of the batch's targets in nats, and (N,) entropies if asked; with gradient.

        `truncation`: the sampler's; fills in the column `log_kept`, and changes nothing of what is returned.
        """
        return self.logprobs_and_hidden(batch, temperature=temperature, entropy=entropy, truncation=truncation)[:2]

    def logprobs_and_hidden(
        self,
        batch: PackedBatch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        truncation: Truncation | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return what `logprobs` returns, and the (N, C) hidden states behind it, for another head on the same trunk.

        With a sequence group, the hidden states are those of this rank's own targets.
        """
        return self.root(  # type: ignore[no-any-return]
            self._logprobs, self.base_model, batch, temperature, entropy, truncation
        )

    def logprobs_and_log_sum_sq_probs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return (N,) logprobs, and (N,) log of the sum over the vocabulary of p^2, which has no gradient."""
        return self.root(self._logprobs_and_log_sum_sq_probs, batch)  # type: ignore[no-any-return]

    def _logprobs_and_log_sum_sq_probs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        logp_N, _, hidden_NC = self._logprobs(self.base_model, batch, 1.0, False)
        log_sum_sq_probs = chunked_log_sum_sq_probs(hidden_NC, head_weight(self.base_model), chunk_size=self.chunk_size)
        own, _ = self.sequence.own(batch.source_N, batch.num_tokens)
        return logp_N, self.sequence.whole(log_sum_sq_probs, own, batch.num_targets)

    @torch.no_grad()
    def reference_logprobs(self, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
        """Return (N,) float32 logprobs under the reference, without gradient."""
        if not self.has_reference:
            raise ValueError("this policy was made without a reference")
        with self.inference():
            if self._reference is not None:
                return self._reference(self._logprobs, self._reference.model, batch, temperature, False)[0]  # type: ignore[no-any-return]
            with self.model.disable_adapter():
                return self.root(self._logprobs, self.base_model, batch, temperature, False)[0]  # type: ignore[no-any-return]

    def kl_to_reference(self, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
        """Return (N,) KL(policy || reference) over the vocabulary at each target, in nats, with gradient for the policy.

        The reference must be a model of its own; it may have another size, but not another vocabulary.
        """
        if self._reference is None:
            raise ValueError("kl_to_reference needs a reference that is a model of its own")
        # within the reference's forward, because its head is read too
        return self._reference(lambda: self.root(self._kl, batch, temperature))  # type: ignore[no-any-return]

    def _kl(self, batch: PackedBatch, temperature: float) -> Tensor:
        assert self._reference is not None
        with self.inference():
            other_hidden_ND = self._hidden(self._reference.model, batch)
        hidden_NC = self._hidden(self.base_model, batch)
        other_head_VD = head_weight(self._reference.model)
        kl = chunked_kl(
            hidden_NC,
            head_weight(self.base_model),
            other_hidden_ND,
            other_head_VD,
            temperature=temperature,
            chunk_size=self.chunk_size,
        )
        own, _ = self.sequence.own(batch.source_N, batch.num_tokens)
        return self.sequence.whole(kl, own, batch.num_targets)

    def _logprobs(
        self,
        model: PreTrainedModel,
        batch: PackedBatch,
        temperature: float,
        entropy: bool,
        truncation: Truncation | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        hidden_NC = self._hidden(model, batch)
        own, _ = self.sequence.own(batch.source_N, batch.num_tokens)
        logp_N, entropy_N = chunked_logprobs(
            hidden_NC,
            head_weight(model),
            batch.target_N[own],
            temperature=temperature,
            chunk_size=self.chunk_size,
            entropy=entropy,
        )
        logp_N = self.sequence.whole(logp_N, own, batch.num_targets)
        if entropy_N is not None:
            entropy_N = self.sequence.whole(entropy_N, own, batch.num_targets)
        if truncation is not None:
            kept = chunked_log_kept(
                hidden_NC.detach(),
                head_weight(model),
                batch.target_N[own],
                truncation,
                temperature=temperature,
                chunk_size=self.chunk_size,
            )
            batch.per_token["log_kept"] = self.sequence.whole(kept, own, batch.num_targets)
        return logp_N, entropy_N, hidden_NC

    def _hidden(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """Return the (N, C) hidden states that predict the batch's targets; with a sequence group, of this rank's own."""
        if model is self.base_model:
            hidden_NC = self.hidden_states(batch, batch.source_N, batch.sequence_N)
        else:
            with self.autocast():
                hidden_NC = hidden_states(model, batch, batch.source_N, batch.sequence_N, sequence=self.sequence)
        return hidden_NC.to(self.compute_dtype)

    def reference_weights(self) -> dict[str, Tensor]:
        """Return the weights of the reference by name; without a reference, those of the policy."""
        if self._reference is not None:
            return self._reference.model.state_dict()
        if not self.has_reference:
            return dict(self.model.state_dict())
        return {
            _NOT_OF_THE_BASE.sub("", name): tensor
            for name, tensor in self.base_model.state_dict().items()
            if ".lora_" not in name and ".modules_to_save." not in name and ".trainable_tokens_" not in name
        }

    @property
    def reference_config(self) -> PreTrainedConfig:
        return (self.base_model if self._reference is None else self._reference.model).config

    def drop_reference(self) -> None:
        """Free the reference, if it is a model of its own."""
        if self._reference is not None:
            self._reference, self.has_reference = None, False

    def refresh_reference(self, alpha: float) -> None:
        """Mix the policy into the reference: reference = alpha * policy + (1 - alpha) * reference."""
        if self._reference is None:
            raise ValueError("only a reference that is a copy of the weights can be refreshed")
        self._reference.mix(self.model, alpha)

    def save_reference(self, folder: Path, *, write: bool = True) -> None:
        """Write the reference to `folder`, if it is a model of its own; call it on every rank, with `write` on one."""
        if self._reference is not None:
            self._reference.save(folder, write=write)

    def restore_reference(self, folder: Path) -> None:
        """Read back what `save_reference` wrote."""
        if self._reference is not None:
            self._reference.load(folder)

    @property
    def generation_config(self) -> Any:
        return self.base_model.generation_config

    @on_all_ranks("context")
    @contextlib.contextmanager
    def generation_model(self) -> Iterator[PreTrainedModel]:
        """Prepare the model for `generate` inside: eval mode, transformers' attention, no gradients."""
        if self.is_tensor_parallel:
            raise ConfigError(
                "a model in shards (parallel.autotp_size) cannot sample by itself: set rollout.engine to vllm, and leave "
                "eval_generation out"
            )
        model = self.base_model
        if self.recomputation:
            recompute_activations(model, False)
        try:
            with own_attention(model), self.inference(), self.autocast(), whole_model(self.root):
                yield model
        finally:
            if self.recomputation:
                recompute_activations(model, self.recomputation)

    @on_all_ranks("stream")
    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight under its checkpoint name, in the compute dtype, with adapters merged and tied heads.

        These are the names that vLLM loads: experts are split from transformers' fused form, and `lm_head.weight` is
        there for tied models too, because vLLM would otherwise keep its old head.
        """
        return checkpoint_weights(self.base_model, dtype=self.compute_dtype)

    @property
    def lora_obstacle(self) -> str | None:
        """Return why the adapter alone cannot be sent to rollout workers; None if it can."""
        return lora_obstacle(self.model) if self.has_adapter else "there is no adapter"

    @property
    def lora_rank(self) -> int:
        """Return the largest rank of the adapter."""
        return adapter_rank(self.model)

    @on_all_ranks("stream")
    def export_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapter's weights under PEFT's names, with its scaling folded in."""
        return adapter_weights(self.model)


def _has_new_adapter(model: nn.Module) -> bool:
    """Return whether the model has an adapter that adds nothing yet, so that switching it off changes nothing."""
    if not isinstance(model, PeftModel):
        return False
    weights = dict(model.named_parameters())
    if any(".modules_to_save." in name for name in weights):
        return False
    tokens: list[Any] = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    return all(
        torch.equal(layer.trainable_tokens_delta[adapter].to(original), original)
        for layer in tokens
        for adapter, original in layer.trainable_tokens_original.items()
    ) and not any(
        weight.any() for name, weight in weights.items() if ".lora_B." in name or ".lora_embedding_A." in name
    )
