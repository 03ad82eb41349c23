"""Find the model and the tokenizer that a run starts with, and check that they fit together."""

from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from rlqwen.config import TrainerConfig
from rlqwen.distributed import MainRank
from rlqwen.errors import ModelError
from rlqwen.models.folder_files import UNREADABLE
from rlqwen.models.hub import check_vocabulary, split_revision
from rlqwen.models.loading import load_tokenizer, local_folder, take_eos_token, text_tokenizer
from rlqwen.models.packed_model import PackedModel
from rlqwen.models.tiny import resolve_model_path
from rlqwen.trainers.run_context import RunContext


def name_of(model: str | nn.Module) -> str:
    """Return the folder or hub id of a model; the name of its class if it has none."""
    if isinstance(model, str):
        return model
    config: Any = model.config
    return config._name_or_path or type(model).__name__


def resolve_source(model: str | nn.Module, shape: dict[str, Any], run: RunContext) -> str | nn.Module:
    """Return the model, or the folder or hub id to load it from; build a built-in model of this shape in the run folder."""
    if not isinstance(model, str):
        return model
    return MainRank(run.ranks).run(lambda: resolve_model_path(model, run.output_dir / "base_model", **shape))


def source_folder(source: str | nn.Module, args: TrainerConfig) -> str | None:
    """Return the local folder of a model, after a download if needed; None if the model was given as an object."""
    return local_folder(source, args.model_init_kwargs.get("revision")) if isinstance(source, str) else None


def find_tokenizer(
    given: PreTrainedTokenizerBase | None, source: str | nn.Module, args: TrainerConfig
) -> PreTrainedTokenizerBase:
    """Return the given tokenizer, else that of the model, with the EOS token of the config.

    Raises ModelError, before the model is loaded, if it has tokens without a row in the model's embedding.
    """
    tokenizer = text_tokenizer(given) or load_tokenizer(name_of(source), args)
    take_eos_token(tokenizer, getattr(args, "eos_token", None))
    if isinstance(source, str):
        name, revision = split_revision(source)
        revision = revision or args.model_init_kwargs.get("revision", "main")
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
        except UNREADABLE as error:
            raise ModelError(f"model {source!r}: its config cannot be used: {error}") from error
        check_vocabulary(tokenizer, config, f"model {source!r}")
    return tokenizer


def check_policy(policy: PackedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError if the model cannot be trained, or if it or its reference lacks tokens of the tokenizer."""
    policy.check_trainable()
    own = policy.base_model.config
    for config in (own, getattr(policy, "reference_config", own)):
        check_vocabulary(tokenizer, config, f"model {config._name_or_path!r}")
