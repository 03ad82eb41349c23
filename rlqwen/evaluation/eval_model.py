"""Find the model under evaluation, and load its weights if it runs in this process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlqwen.config import ModelConfig, TrainerConfig
from rlqwen.data import load_chat_template
from rlqwen.models.loading import load_model, local_folder
from rlqwen.models.model_classes import check_weights
from rlqwen.models.tiny import resolve_model_path
from rlqwen.preflight import check_model_path
from rlqwen.preflight.model_check import ModelFacts, read_model

if TYPE_CHECKING:
    from rlqwen.models.policy import Policy


@dataclass(frozen=True)
class EvalModel:
    """A model by its files."""

    name: str
    """The name that the user gave."""
    folder: str
    facts: ModelFacts


def find_model(name: str, scratch: Path, chat_template_path: str | None = None) -> EvalModel:
    """Return the model with its folder: itself, built under `scratch`, or downloaded to the hub's cache.

    Raises ModelError if there is no such model.
    """
    check_model_path(name)
    folder = local_folder(resolve_model_path(name, scratch))
    facts = read_model(ModelConfig(path=folder), scratch)
    assert facts is not None  # a local folder is read or refused
    check_weights(folder, to_train=False)
    if chat_template_path is not None:
        facts.tokenizer.chat_template = load_chat_template(chat_template_path)
    return EvalModel(name, folder, facts)


@contextmanager
def policy_of(folder: str) -> "Iterator[Policy]":
    """Hold the model in this process inside, frozen, in the dtype that it computes in; free its memory afterwards."""
    import torch

    from rlqwen.distributed import pick_device
    from rlqwen.models.policy import Policy

    device = pick_device(use_cpu=False)
    is_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    args = TrainerConfig(
        bf16=is_bf16,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "bfloat16" if is_bf16 else "float32"},
    )
    policy = Policy(load_model(folder, args).requires_grad_(False), args, device=device)
    try:
        yield policy
    finally:
        policy.model = None  # free the weights even if someone still holds the policy
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
