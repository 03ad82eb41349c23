"""Hold models that output one number, the reward model and PPO's critic, on the packed forward of the policy.

    reward = ScalarModel(load_scalar_model("models/rm", args), args)
    scores_S = reward.scores(batch)                  # one per sequence, from its last token

Shapes: N target tokens, S sequences, C hidden size.
"""

import copy
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlqwen.config import TrainerConfig
from rlqwen.distributed import exact_weight, gathered, keep_exact
from rlqwen.models.packed_model import PackedModel
from rlqwen.models.weight_checks import copy_whole
from rlqwen.packing.batch import PackedBatch
from rlqwen.packing.forward import last_tokens
from rlqwen.packing.sequence_parallel import SequenceGroup

HEAD_FILE = "value_head.safetensors"


class Critic(Protocol):
    """Estimate, at each token of a completion, the value of the tokens that follow."""

    @property
    def trained_parameters(self) -> list[nn.Parameter]: ...

    @property
    def trained_names(self) -> list[str]: ...

    @property
    def root(self) -> nn.Module:
        """Return the module that holds the weights; every forward on them goes through it."""
        ...

    def values(self, batch: PackedBatch, hidden_NC: Tensor) -> Tensor:
        """Return (N,) float32 values of the tokens before each target.

        `hidden_NC`: hidden states from the policy's `logprobs_and_hidden`; a separate critic does not read them.
        """
        ...

    def save_checkpoint(self, folder: Path, *, write: bool = True) -> None:
        """Write the critic's weights into `folder`; call it on every rank, with `write` on one."""
        ...

    def load_checkpoint(self, folder: Path) -> None:
        """Load the weights that `save_checkpoint` wrote."""
        ...


class ScalarModel(PackedModel):
    """Wrap a transformers sequence-classification model with one label, or a PeftModel around one."""

    def __init__(self, model: nn.Module, args: TrainerConfig, *, peft_config: Any = None, **options: Any) -> None:
        super().__init__(model, args, peft_config=scalar_peft_config(peft_config), **options)
        trunk = self.base_model.base_model
        self._check_forward(lambda hidden_RC: hidden_RC, lambda ids: trunk(input_ids=ids, use_cache=False)[0])

    def scores(self, batch: PackedBatch) -> Tensor:
        """Return (S,) float32: the model's output at each sequence's last token, which transformers reads too."""
        sequence_S = torch.arange(batch.num_sequences, device=batch.input_ids.device)
        return self._numbers(batch, last_tokens(batch), sequence_S)

    def values(self, batch: PackedBatch, hidden_NC: Tensor) -> Tensor:
        """Return (N,) float32 values, as Critic defines them, from a forward of this model."""
        return self._numbers(batch, batch.source_N, batch.sequence_N)

    def zero_head(self) -> None:
        """Zero the head, so that every output is 0 at the start."""
        nn.init.zeros_(self._head.weight)

    def _numbers(self, batch: PackedBatch, index_R: Tensor, sequence_R: Tensor) -> Tensor:
        numbers = self.root(self._score, batch, index_R, sequence_R)
        own, _ = self.sequence.own(index_R, batch.num_tokens)
        return self.sequence.whole(numbers, own, len(index_R))

    def _score(self, batch: PackedBatch, index_R: Tensor, sequence_R: Tensor) -> Tensor:
        hidden_RC = self.hidden_states(batch, index_R, sequence_R)
        head = self._head
        numbers_R1: Tensor = head(hidden_RC.to(next(head.parameters()).dtype))
        return numbers_R1[:, 0].float()

    @property
    def _head(self) -> Any:
        """Return the model's own head, within an adapter's wrapper if there is one."""
        return self.base_model.score


class ValueHead:
    """Estimate values from the policy's hidden states with one matrix, which starts at 0."""

    def __init__(
        self, hidden_size: int, *, train_trunk: bool, device: torch.device, sequence: SequenceGroup | None = None
    ) -> None:
        self.sequence = sequence or SequenceGroup()
        self.head = nn.Linear(hidden_size, 1, bias=False, device=device)
        nn.init.zeros_(self.head.weight)
        self.train_trunk = train_trunk

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    @property
    def trained_names(self) -> list[str]:
        return ["weight"]

    @property
    def root(self) -> nn.Module:
        return self.head

    def values(self, batch: PackedBatch, hidden_NC: Tensor) -> Tensor:
        """Return (N,) float32 values from the policy's hidden states; with `train_trunk`, gradients reach the policy."""
        hidden_NC = hidden_NC if self.train_trunk else hidden_NC.detach()
        values: Tensor = self.head(hidden_NC.to(self.head.weight.dtype))[:, 0].float()
        if self.sequence.size == 1:
            return values
        own, _ = self.sequence.own(batch.source_N, batch.num_tokens)
        return self.sequence.whole(values, own, batch.num_targets)

    def save_checkpoint(self, folder: Path, *, write: bool = True) -> None:
        """Write the head into `folder`; call it on every rank, with `write` on one."""
        folder.mkdir(parents=True, exist_ok=True)
        with gathered([self.head]):
            weight = exact_weight(self.head.weight, None).detach().float().cpu()
        if write:
            save_file({"weight": weight.contiguous()}, folder / HEAD_FILE)

    def load_checkpoint(self, folder: Path) -> None:
        """Load the head that `save_checkpoint` wrote."""
        weight = load_file(folder / HEAD_FILE)["weight"]
        with gathered([self.head], modify=True):
            copy_whole(HEAD_FILE, weight, self.head.weight)
        keep_exact(self.head.weight, weight)


def scalar_peft_config(peft_config: Any) -> Any:
    """Return the same adapter for a model with a classification head, which is trained fully: it starts random or 0."""
    if peft_config is None:
        return None
    config = copy.deepcopy(peft_config)
    config.task_type = "SEQ_CLS"
    kept = [module for module in config.modules_to_save or () if module != "lm_head"]
    config.modules_to_save = list(dict.fromkeys([*kept, "score"]))
    return config
