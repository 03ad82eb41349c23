"""Hold a transformers model in training: packed attention, adapters, precision, and the folders that it is written to.

Trained weights are float32 whatever the model's dtype: an optimizer at lr 1e-6 would lose its updates in bfloat16
rounding without a sign. Frozen ones keep theirs, quantized or not, norms included: Qwen's norms compute in float32
whatever they hold. With `bf16` the forward runs under autocast.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlqwen.config import TrainerConfig
from rlqwen.distributed import compute_dtype, gathered, has_exact, is_sharded, keep_exact, on_this_rank
from rlqwen.distributed.fsdp import shards_weights
from rlqwen.distributed.master_weights import MasterWeights
from rlqwen.distributed.tensor_parallel import shard_layers
from rlqwen.errors import ModelError
from rlqwen.models.adapters import add_adapter, changes_base, check_wrappers, read_adapter
from rlqwen.models.carried_weights import carried_by, carry, count_text
from rlqwen.models.experts import use_compute_dtype
from rlqwen.models.float32_weights import mark_float32, saved_dtype
from rlqwen.models.gpu_forward import speed_up_on_gpu
from rlqwen.models.merged_weights import checkpoint_weights
from rlqwen.models.model_classes import saved_weights
from rlqwen.models.model_support import check_config, check_forward
from rlqwen.models.moe_balance import RouterBalance
from rlqwen.models.quantization import prepare_quantized, quantized_bits, use_training_products
from rlqwen.models.recomputation import Recomputation, recompute_activations
from rlqwen.models.root import Root
from rlqwen.models.text_only import text_only
from rlqwen.models.vision_language import towers
from rlqwen.models.weight_checks import copy_whole
from rlqwen.models.weight_files import write_model
from rlqwen.packing.attention import attention_note
from rlqwen.packing.batch import PackedBatch
from rlqwen.packing.delta_net import kernel_note
from rlqwen.packing.forward import (
    cutting_obstacle,
    hidden_states,
    last_tokens,
    own_attention,
    packing_obstacle,
    use_packed_attention,
)
from rlqwen.packing.routing_replay import RoutingReplay
from rlqwen.packing.sequence_parallel import SequenceGroup

ADAPTER_FOLDER = "adapter"


def check_cuttable(config: Any, size: int) -> None:
    """Raise ModelError if `size` ranks cannot each forward a slice of a row through a model of this config."""
    if size > 1 and (obstacle := cutting_obstacle(config)):
        raise ModelError(
            f"parallel.sequence_parallel_size={size}: {obstacle}, so that a row cannot be cut into slices; leave it at 1"
        )


class PackedModel:
    """Hold what a policy, a reward model and a critic have in common; see Policy and ScalarModel."""

    def __init__(
        self,
        model: Any,
        args: TrainerConfig,
        *,
        peft_config: Any = None,
        device: torch.device | str = "cpu",
        sequence: SequenceGroup | None = None,
    ) -> None:
        """Take over `model`; it is changed in place.

        Args:
            model: a transformers model, its weights plain or bitsandbytes', or a PeftModel around one. Of one with a
                vision tower the text model is taken over; see rlqwen.models.text_only.
            peft_config: a peft.LoraConfig; None trains all weights (or the PeftModel's adapter).
            sequence: the ranks that forward a row together, each a slice of it; ModelError if this model cannot.
        """
        model = text_only(model)
        for tower in towers(getattr(model, "get_base_model", lambda: model)()).values():
            tower.requires_grad_(False)
        check_config(model.config)
        self.device = torch.device(device)
        self.sequence = sequence or SequenceGroup()
        self.sequence.check(model.config)
        check_cuttable(model.config, self.sequence.size)
        self.original_dtype: torch.dtype = model.dtype
        mark_float32(model)
        self.compute_dtype = compute_dtype(args, self.device)
        self.notes: list[str] = []
        """Notes for the user on how the arguments were understood."""
        if peft_config is not None:
            model, self.notes = add_adapter(model, peft_config)
        self.notes += self._kernel_notes(model.config)
        self.quantized_bits = quantized_bits(model)
        """4 or 8 with bitsandbytes weights; None with plain ones."""
        if self.quantized_bits and args.parallel.zero_stage == 3:
            raise ModelError(
                f"parallel.zero_stage=3 shards plain weights, and these have {self.quantized_bits} bits: set it to 2 at "
                "most, or load the model without quantization"
            )
        if self.quantized_bits:
            prepare_quantized(model)
        self.shards_weights = shards_weights(args.parallel)
        """Whether each rank holds a part of every matrix, as FSDP2 cuts it."""
        loaded = Root.of(model.get_base_model() if isinstance(model, PeftModel) else model)
        self.root = loaded or Root(model)
        if loaded or not self.shards_weights:
            model.to(self.device)
        self.model: Any = model
        self.version = 0
        """How often the trained weights were changed, by an update or a checkpoint; never falls."""
        self.has_adapter = isinstance(model, PeftModel)
        self._carry_unused()
        if self.has_adapter:
            check_wrappers(model)
        self.is_tensor_parallel = args.parallel.autotp_size > 1
        """Whether this rank holds shards of the layers, and computes with them."""
        shard_layers(self.model, args.parallel.autotp_size)
        self._prepare_training(args)
        if self.shards_weights and not loaded:
            self.root.shard(device=self.device, dtype=self.compute_dtype)
        self.routers = RouterBalance(self.base_model, args.router_aux_loss_coef)
        self._router_logits: list[Tensor] = []
        self.replay: RoutingReplay | None = None
        """Replays the experts that a batch has recorded; None if nothing is replayed."""

    def _kernel_notes(self, config: Any) -> list[str]:
        """Return what the user should know about how rows are computed."""
        text = config.get_text_config(decoder=True)
        if obstacle := packing_obstacle(config):
            rows: str | None = f"{obstacle}: sequences are forwarded one after another, each with its prompt again"
        else:
            rows = attention_note(text, self.device, self.compute_dtype)
        return [note for note in (rows, kernel_note(text, self.device.type)) if note]

    def _prepare_training(self, args: TrainerConfig) -> None:
        trained = self.trained_parameters
        if any(map(is_sharded, trained)):
            self.root.float()  # whose modules tell FSDP2
        for parameter in trained:
            if not is_sharded(parameter):
                parameter.data = parameter.data.float()
        chosen = args.gradient_checkpointing
        self.recomputation: Recomputation = self.device.type == "cuda" if chosen is None else chosen
        """What is computed again in the backward pass."""
        if self.recomputation:
            recompute_activations(self.base_model, self.recomputation)
            if self.has_adapter:
                self.base_model.enable_input_require_grads()
        if args.disable_dropout:
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        use_packed_attention(self.base_model)
        use_compute_dtype(self.base_model)
        speed_up_on_gpu(self.base_model)
        self.model.train()

    def _check_forward(self, head: Callable[[Tensor], Tensor], own: Callable[[Tensor], Tensor]) -> None:
        """Raise ModelError if packed rows are computed wrongly, see rlqwen.models.model_support.

        `head` computes outputs from hidden states; `own` returns the model's own (1, L, V) outputs for (1, L) token ids.
        """

        def packed(batch: PackedBatch) -> Tensor:
            sequence_S = torch.arange(batch.num_sequences, device=self.device)
            arguments = (self.base_model, batch, last_tokens(batch), sequence_S)
            return head(hidden_states(*arguments, sequence=SequenceGroup()).to(self.compute_dtype))

        def plain(sequences: list[list[int]]) -> Tensor:
            with own_attention(self.base_model):
                return torch.stack([own(torch.tensor([ids], device=self.device))[0, -1] for ids in sequences])

        halves = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in self.base_model.parameters())
        exact = self.compute_dtype == torch.float32 and not self.quantized_bits and not halves
        with self.inference(), self.autocast():
            self.root(lambda: check_forward(self.base_model, packed, plain, exact=exact))

    def _carry_unused(self) -> None:
        """Find the weights of its checkpoint that a model given as an object has not loaded."""
        base: Any = self.base_model
        name = base.config._name_or_path
        is_found = carried_by(base) is not None or carry(base, name)
        self.kept_note: str | None = None
        """A sentence on what is kept unchanged, or cannot be; None if there is nothing to say."""
        if carried := carried_by(base):
            self.kept_note = carried.summary()
        elif name and not is_found and base._keys_to_ignore_on_load_unexpected:
            self.kept_note = (
                f"{name!r} is neither a folder here nor in the hub's cache, so that what {type(base).__name__} has left of "
                "it (a vision tower, multi-token prediction), if it had any, is not in the folders that are written"
            )

    @property
    def base_model(self) -> PreTrainedModel:
        """Return the transformers model, which contains the adapters, if any."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[no-any-return]

    @property
    def text_config(self) -> Any:
        """Return the config of the text model: the whole, or a part of it if the model sees images too."""
        return self.base_model.config.get_text_config()

    def has_base_of(self, folder: str) -> bool:
        """Return whether the model under the adapter is still the one in `folder`, from which it was loaded."""
        if not self.has_adapter:
            return not self.quantized_bits
        changed = any(changes_base(config) for config in self.model.peft_config.values())
        return not (self.quantized_bits or changed) and saved_dtype(folder) == self.original_dtype

    def check_trainable(self) -> None:
        """Raise ModelError if the weights are quantized and there is no adapter to train, or if they cannot be saved."""
        if carried := carried_by(self.base_model):
            carried.require_writable()
        if self.quantized_bits and not self.has_adapter:
            raise ModelError(
                f"{self.quantized_bits}-bit weights cannot be trained themselves: give peft_config (model.lora in a "
                "recipe) to train an adapter on them, or load the model without quantization"
            )

    @property
    def frozen_note(self) -> str | None:
        """Return a sentence on the weights that the user froze; None if there are none, or if an adapter is trained."""
        frozen = {name: weight for name, weight in self.model.named_parameters() if not weight.requires_grad}
        if self.has_adapter or not frozen:
            return None
        number = sum(weight.numel() for weight in frozen.values())
        names = ", ".join(list(frozen)[:3]) + (", ..." if len(frozen) > 3 else "")
        return f"frozen, as they came: {len(frozen)} weights ({count_text(number)} parameters): {names}"

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def trained_names(self) -> list[str]:
        """Return the names of `trained_parameters`, in the same order."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @on_this_rank
    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Switch off gradients and dropout inside."""
        was_training = self.model.training
        self.model.eval()
        if self.quantized_bits == 8:
            use_training_products(self.model)
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def autocast(self) -> torch.autocast:
        """Return a context in which a forward has its precision."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def hidden_states(self, batch: PackedBatch, index_R: Tensor, sequence_R: Tensor) -> Tensor:
        """Return hidden states of the trained model, see rlqwen.packing.forward; keep its router logits for their loss."""
        watches = self.routers.coefficient > 0 and torch.is_grad_enabled()
        router_logits: list[Tensor] | None = [] if watches else None
        with self.autocast():
            hidden_RC = hidden_states(
                self.base_model, batch, index_R, sequence_R, sequence=self.sequence, router_logits=router_logits
            )
        if router_logits is not None:
            self._router_logits = router_logits
        return hidden_RC

    def router_loss(self, weight: float) -> Tensor | float:
        """Return the weighted load-balancing loss of the last forward with gradient; 0 if there is none to add.

        `weight`: the forward's share of the update, by tokens of the packed row.
        """
        logits, self._router_logits = self._router_logits, []
        return self.routers.loss(logits, weight, self.sequence) if logits else 0.0

    def save(
        self, folder: Path | str, *, dtype: torch.dtype | None = None, adapter: bool = True, write: bool = True
    ) -> None:
        """Write a folder that `from_pretrained` loads, of plain weights, adapters merged or (`adapter` False) left out.

        Like all functions that save, call it on every rank, with `write` on one of them, because weights may be sharded.
        `dtype` None keeps the dtype of each weight.
        """
        with contextlib.nullcontext() if adapter or not self.has_adapter else self.model.disable_adapter():
            weights = checkpoint_weights(self.base_model, dtype=dtype)
            if write:
                write_model(folder, self.base_model, weights)
            elif self.is_sharded or any(map(has_exact, self.model.parameters())):
                for _ in weights:
                    pass

    def save_adapter(self, folder: Path | str, *, write: bool = True) -> None:
        """Write the adapter alone, as PEFT loads it, without the embedding of the base."""
        with gathered(self.model.modules(), trained=True):
            exact = {
                name: weight.engine.master_of(weight).detach()
                for name, weight in self.model.named_parameters()
                if isinstance(getattr(weight, "engine", None), MasterWeights)
            }
            if write:
                state = self.model.state_dict() | exact if exact else None
                self.model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)

    def save_checkpoint(self, folder: Path, *, write: bool = True) -> None:
        """Write what `load_checkpoint` reads: a folder for `from_pretrained`, and the adapter in `adapter/`."""
        self.save(folder, write=write)
        if self.has_adapter:
            self.save_adapter(folder / ADAPTER_FOLDER, write=write)

    @property
    def is_sharded(self) -> bool:
        """Return whether each rank holds only shards; forwards, saving and export then need all ranks."""
        return self.is_tensor_parallel or any(map(is_sharded, self.model.parameters()))

    def load_checkpoint(self, folder: Path | str) -> None:
        """Load into the trained weights what `save_checkpoint`, `save` or (with an adapter) `save_adapter` wrote."""
        if self.has_adapter:
            inner = Path(folder) / ADAPTER_FOLDER
            path = (inner if inner.is_dir() else Path(folder)) / "adapter_model.safetensors"
            with gathered(self.model.modules(), trained=True):
                weights = read_adapter(path, self.model)
            with gathered(self.model.modules(), trained=True, modify=True):
                set_peft_model_state_dict(self.model, weights)
            for module in self.model.modules():
                with gathered([module], trained=True):
                    for parameter in module.parameters(recurse=False):
                        keep_exact(parameter, parameter.detach())
            self.version += 1
            return
        saved = saved_weights(self.base_model, Path(folder))
        for prefix, module in self.base_model.named_modules():
            own = {name: f"{prefix}.{name}".lstrip(".") for name in module.state_dict() if "." not in name}
            with torch.no_grad(), gathered([module], modify=True):
                for name, stored in own.items():
                    copy_whole(stored, saved[stored], getattr(module, name))
            for name, stored in own.items():
                keep_exact(getattr(module, name), saved[stored])
        self.version += 1
