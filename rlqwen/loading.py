"""Models and tokenizers by name: a folder, a hub id, or a built-in model."""

from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlqwen.config import TrainerConfig
from rlqwen.errors import ModelError

Args = TypeVar("Args", bound=TrainerConfig)


def load_model(name_or_path: str, args: TrainerConfig) -> PreTrainedModel:
    """AutoModelForCausalLM.from_pretrained with our errors."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            name_or_path, trust_remote_code=args.trust_remote_code, **args.model_init_kwargs
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name_or_path!r} cannot be loaded: {error}") from error


def split_builtin_arguments(model: str, args: Args) -> tuple[dict[str, Any], Args]:
    """The shape of a built-in model, and the config without it: `from_pretrained` must not see it."""
    if not model.startswith("builtin:"):
        return {}, args
    shape = {key: value for key, value in args.model_init_kwargs.items() if key != "dtype"}
    rest = {key: value for key, value in args.model_init_kwargs.items() if key == "dtype"}
    return shape, args.model_copy(update={"model_init_kwargs": rest})


def local_folder(name_or_path: str, args: TrainerConfig) -> str:
    """The folder itself, or where the hub's snapshot of a model lies on this machine, downloaded if need be."""
    if Path(name_or_path).is_dir():
        return name_or_path
    try:
        return snapshot_download(
            name_or_path,
            revision=args.model_init_kwargs.get("revision"),
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"],
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(f"model {name_or_path!r} is no folder and cannot be had from the hub: {error}") from error


def load_tokenizer(name_or_path: str, args: TrainerConfig) -> PreTrainedTokenizerBase:
    """AutoTokenizer.from_pretrained with our errors; padding falls back to the end-of-turn token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path,
            trust_remote_code=args.trust_remote_code,
            revision=args.model_init_kwargs.get("revision", "main"),
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"tokenizer of {name_or_path!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
