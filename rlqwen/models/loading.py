"""Load models and tokenizers by name: a folder, a hub id, or a built-in model."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import align_special_tokens

from rlqwen.config import TrainerConfig
from rlqwen.distributed import compute_dtype, pick_device
from rlqwen.distributed.fsdp import shards_weights
from rlqwen.errors import ConfigError, ModelError
from rlqwen.models.adapters import reads_base
from rlqwen.models.folder_files import UNREADABLE
from rlqwen.models.hub import download, pinned, refuse_pickles, split_revision
from rlqwen.models.model_classes import load_causal, load_scalar, quiet_loading
from rlqwen.models.quantization import require_bitsandbytes
from rlqwen.models.root import Root
from rlqwen.models.sharded_loading import NotInPartsError, loading_in_parts
from rlqwen.models.tiny import resolve_model_path
from rlqwen.terminal import warn

Args = TypeVar("Args", bound=TrainerConfig)
Loaded = TypeVar("Loaded")
_FEWEST_TOKENS = 256
"""Tokens of a byte-level tokenizer at least; from a folder without one transformers makes one of special tokens alone."""
_LOADING_ARGUMENTS = ("dtype", "quantization_config")
"""Arguments of a built-in model that `from_pretrained` must get."""


def load_model(name_or_path: str, args: TrainerConfig, *, in_parts: bool = True) -> PreTrainedModel:
    """Load a causal language model by name, see rlqwen.models.model_classes; ModelError if that fails.

    `in_parts`: whether a rank may load only the parts of the weights that it will keep; else they are cut later.
    """
    name_or_path, arguments = pinned(name_or_path, args.model_init_kwargs)
    if arguments.get("quantization_config") is not None:
        require_bitsandbytes("quantization_config")
        # Quantized weights are laid out for the device that they are loaded on.
        arguments.setdefault("device_map", {"": pick_device(args.use_cpu)})
    return _load(load_causal, name_or_path, args, arguments, in_parts=in_parts)


def load_scalar_model(name_or_path: str, args: TrainerConfig, *, in_parts: bool = True) -> tuple[PreTrainedModel, bool]:
    """Return a model that outputs one number, and whether it had a head for it; a causal model gets a new one.

    Raises ModelError, also if the folder has a head with several labels. `in_parts`: see `load_model`.
    """
    name_or_path, arguments = pinned(name_or_path, args.model_init_kwargs)
    return _load(load_scalar, name_or_path, args, arguments, in_parts=in_parts)


def _load(
    load: Callable[..., Loaded], name_or_path: str, args: TrainerConfig, arguments: dict[str, Any], *, in_parts: bool
) -> Loaded:
    """Call `load`; if ranks share weights, for this rank's parts, where transformers can read these."""
    options = {"trust_remote_code": args.trust_remote_code, **arguments}
    if not in_parts or not shards_weights(args.parallel) or arguments.get("quantization_config") is not None:
        return load(name_or_path, **options)
    device = pick_device(args.use_cpu)
    dtype = compute_dtype(args, device)
    try:
        with loading_in_parts(lambda model: Root.shard_without_memory(model, device=device, dtype=dtype)) as more:
            return load(name_or_path, **options, **more)
    except NotInPartsError:
        return load(name_or_path, **options)


def load_with_reference(
    name_or_path: str, args: TrainerConfig, *, peft_config: Any, reference: bool | nn.Module
) -> tuple[PreTrainedModel, bool | nn.Module]:
    """Return a model by name, and its reference as Policy takes it: a model in parts cannot be copied, and is loaded again."""
    model = load_model(name_or_path, args, in_parts=not reads_base(peft_config))
    if reference is True and peft_config is None and Root.of(model) is not None:
        reference = load_model(name_or_path, args)
    return model, reference


def load_reference(ref_model: str | nn.Module, model: str | nn.Module, args: TrainerConfig) -> nn.Module:
    """Return the model that a policy is compared with: as given, or loaded with the arguments of `model`.

    A built-in reference has the default shape of its name. Raises ModelError if reference and model are one object.
    """
    if ref_model is model and isinstance(model, nn.Module):
        raise ModelError("ref_model and model are one object, which training changes: leave ref_model out")
    if isinstance(ref_model, nn.Module):
        return ref_model
    if isinstance(model, str):
        _, args = split_builtin_arguments(model, args)
    arguments = {key: value for key, value in args.model_init_kwargs.items() if key != "revision"}
    with tempfile.TemporaryDirectory(prefix="rlqwen-reference-") as folder:  # for a built-in model
        path = resolve_model_path(ref_model, folder)
        return load_model(path, args.model_copy(update={"model_init_kwargs": arguments}))


def split_builtin_arguments(model: str, args: Args) -> tuple[dict[str, Any], Args]:
    """Return the shape of a built-in model, and the config without it, because `from_pretrained` must not get it."""
    if not model.startswith("builtin:"):
        return {}, args
    loading = {key: value for key, value in args.model_init_kwargs.items() if key in _LOADING_ARGUMENTS}
    shape = {key: value for key, value in args.model_init_kwargs.items() if key not in _LOADING_ARGUMENTS}
    return shape, args.model_copy(update={"model_init_kwargs": loading})


def local_folder(name_or_path: str, revision: str | None = None) -> str:
    """Return the folder itself, or that of the hub's snapshot on this machine, after a download if needed."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        refuse_pickles(folder)
        return str(folder)
    name, named = split_revision(name_or_path)
    return str(download(name, {"revision": named or revision}))


def load_generation_config(folder: str) -> GenerationConfig | None:
    """Return the folder's generation config, if it has one."""
    if not (Path(folder) / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except UNREADABLE as error:
        raise ModelError(f"{folder}/generation_config.json cannot be used: {error}") from None


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None, end_of_turn: str | None
) -> tuple[int, ...]:
    """Return the ids that end a completion: those of the tokenizer's EOS, the chat template, and the generation config."""
    configured = generation_config.eos_token_id if generation_config else None
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    if end_of_turn is not None:
        ids.append(tokenizer.convert_tokens_to_ids(end_of_turn))
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def take_eos_token(tokenizer: PreTrainedTokenizerBase, eos_token: str | None) -> None:
    """Set the tokenizer's EOS token to `eos_token`, and its padding token if it has none, as TRL does.

    Raises ConfigError for a token that is not in the vocabulary.
    """
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(f"eos_token: {eos_token!r} is not in the tokenizer's vocabulary")
        tokenizer.eos_token = eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def align_stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn: str | None = None
) -> None:
    """Write the tokenizer's special tokens, as TRL does, and the end-of-turn token to the model's configs.

    Generation from the saved folder then stops where training taught the model to stop. Ids are only added.
    """
    with quiet_loading():
        align_special_tokens(model, tokenizer)
    if not model.can_generate() or model.generation_config is None:
        return
    generation = model.generation_config
    ids = list(stop_token_ids(tokenizer, generation, end_of_turn))
    generation.eos_token_id = ids if len(ids) > 1 else next(iter(ids), None)
    try:
        generation.validate(strict=True)
    except ValueError as error:
        if not generation.do_sample:
            generation.do_sample = True
            warn(f"generation_config.json would not be saved, so do_sample is set to true: {error}", stacklevel=2)


def text_tokenizer(processing_class: Any) -> Any:
    """Return the tokenizer of a processor for text and images; anything else as it is. A processor is named in a warning.

    The tokenizer writes conversations by the processor's chat template if it has none.
    """
    tokenizer = getattr(processing_class, "tokenizer", None)
    if isinstance(processing_class, PreTrainedTokenizerBase) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return processing_class
    warn(
        f"processing_class is a {type(processing_class).__name__}: its tokenizer alone is used and saved, because rlqwen "
        "trains on text",
        stacklevel=2,
    )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = getattr(processing_class, "chat_template", None)
    return tokenizer


def load_tokenizer(name_or_path: str, args: TrainerConfig) -> PreTrainedTokenizerBase:
    """Load a tokenizer; ModelError if that fails. Padding falls back to the end-of-turn token."""
    name_or_path, revision = split_revision(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path,
            trust_remote_code=args.trust_remote_code,
            revision=revision or args.model_init_kwargs.get("revision", "main"),
        )
    except Exception as error:  # the tokenizers library raises bare ones
        raise ModelError(f"tokenizer of {name_or_path!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokens(other: Any, tokenizer: PreTrainedTokenizerBase, what: str) -> str | None:
    """Raise ModelError if the model named `other` has other ids for tokens of `tokenizer`; return a note if it lacks some.

    It will read token ids of `tokenizer`: a reference, a teacher or a critic. `what`: names it in messages. A model given
    as an object, and a folder without a tokenizer, are not checked.
    """
    if not isinstance(other, str):
        return None
    name, revision = split_revision(other)
    with tempfile.TemporaryDirectory(prefix="rlqwen-tokenizer-") as folder:
        try:
            path = resolve_model_path(name, folder)
            theirs = AutoTokenizer.from_pretrained(
                path, revision=revision or "main", trust_remote_code=False
            ).get_vocab()
        except Exception:  # noqa: BLE001 - loading that model says better what is wrong with it
            return None
    if len(theirs) < _FEWEST_TOKENS:
        return None
    ours = tokenizer.get_vocab()
    moved = [token for token, index in ours.items() if theirs.get(token, index) != index]
    if moved:
        token = min(moved, key=ours.__getitem__)
        raise ModelError(
            f"{what} {other!r} has another tokenizer: {len(moved):,} tokens have other ids there, such as {token!r} "
            f"({ours[token]} here, {theirs[token]} there), so it would read other text; give a model with the same tokenizer"
        )
    missing = sorted(ours.keys() - theirs.keys(), key=ours.__getitem__)
    if not missing:
        return None
    return f"{what} {other!r} was not trained with {len(missing):,} of the tokens, such as {missing[0]!r}"
