"""Choose the class that a checkpoint is loaded as: the text-only one, which carries the weights that it does not use.

A Qwen3.5 folder is one of `Qwen3_5ForConditionalGeneration`; here it is loaded as `Qwen3_5ForCausalLM`, or with a
scalar head as `Qwen3_5TextForSequenceClassification`. Saved folders are of the class with all parts again:
`Qwen3_5ForConditionalGeneration`, or with a scalar head `Qwen3_5ForSequenceClassification`.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5MoeConfig,
    Qwen3_5MoePreTrainedModel,
    Qwen3_5MoeTextConfig,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import logging

from rlqwen.errors import ModelError
from rlqwen.models.carried_weights import cached_folder, carry, whole_config_class
from rlqwen.models.float32_weights import restore_float32
from rlqwen.models.folder_files import UNREADABLE, check_files, weight_files
from rlqwen.models.hub import SAFE, commit_of, download, note_commit, read_config, refuse_pickles
from rlqwen.models.quantization import refuse_foreign_quantization
from rlqwen.models.vision_language import auto_class, is_read_from_whole
from rlqwen.models.weight_checks import refuse_integers, refuse_missing, refuse_nonfinite, unquantized_part

_SCALAR = "ForSequenceClassification"
REPORTING: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Arguments with which `from_pretrained` reports weights that do not fit instead of printing a table of them."""
_DTYPE_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")
_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "subfolder", "local_files_only")
_PLACEMENT = ("device_map", "quantization_config", "max_memory", "tp_plan", "tp_size", "device_mesh", "distributed_config",
              "offload_folder", "offload_state_dict")  # fmt: skip
"""Arguments that say where weights go; a model without memory for them must not get these."""


class Qwen3_5MoeTextForSequenceClassification(GenericForSequenceClassification, Qwen3_5MoePreTrainedModel):
    """Add the class that transformers 5.19 lacks; for dense models it has Qwen3_5TextForSequenceClassification."""

    config: Qwen3_5MoeTextConfig  # type: ignore[assignment]  # as transformers' own text-only classes have it


class Qwen3_5MoeForSequenceClassification(GenericForSequenceClassification, Qwen3_5MoePreTrainedModel):
    """Add a vision tower to the class above, whose folders are saved as this class."""

    config: Qwen3_5MoeConfig


_OURS = {
    Qwen3_5MoeTextConfig: Qwen3_5MoeTextForSequenceClassification,
    Qwen3_5MoeConfig: Qwen3_5MoeForSequenceClassification,
}
for _config_class, _model_class in _OURS.items():
    if _config_class not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        # Without exist_ok it does nothing for a config of transformers' own.
        AutoModelForSequenceClassification.register(_config_class, _model_class, exist_ok=True)
# By the name of the class, because names are converted for classes outside transformers only where that is registered.
_conversions = get_checkpoint_conversion_mapping("qwen3_5_moe_text") or []
register_checkpoint_conversion_mapping(Qwen3_5MoeTextForSequenceClassification.__name__, _conversions, overwrite=True)


def load_causal(name: str, *, trust_remote_code: bool = False, **arguments: Any) -> PreTrainedModel:
    """Load a causal language model; of a checkpoint with more parts, the text-only model, which carries the rest.

    `arguments`: arguments of `from_pretrained`. Raises ModelError, also if weights are missing or NaN.
    """
    arguments = _fetched(_read_causal, name, trust_remote_code, arguments)
    model, arguments = _read_causal(name, trust_remote_code, arguments)
    return _loaded(name, model, arguments)


def load_scalar(name: str, *, trust_remote_code: bool = False, **arguments: Any) -> tuple[PreTrainedModel, bool]:
    """Load a model with a head of one label as `load_causal` does, and return it with whether it had that head.

    A causal model gets a new one. Raises ModelError, also if weights are missing or the head has several labels.
    """
    arguments = _fetched(_read_scalar, name, trust_remote_code, arguments)
    model, arguments, has_head = _read_scalar(name, trust_remote_code, arguments)
    return _loaded(name, model, arguments), has_head


def check_weights(
    name: str,
    *,
    scalar: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    to_train: bool = True,
) -> None:
    """Raise ModelError if a model lacks weights, or has some of another shape or of integers; no weight is read.

    `scalar`: of a model with a head of one label, which may be missing. A hub id that is not whole in the cache is
    passed over: loading downloads and checks it. Of a quantized model, what is not quantized is checked. `to_train`:
    refuse quantization that rlqwen cannot train on.
    """
    folder = cached_folder(name, revision)
    if folder is None:
        return
    check_files(folder)
    files = weight_files(folder)
    if not files or not all(file.exists() for file in files):
        return
    if to_train:
        refuse_foreign_quantization(read_config(folder).get("quantization_config"))
    _check_unread(_read_scalar if scalar else _read_causal, str(folder), trust_remote_code, dict(SAFE))


def _fetched(read: Callable[..., Any], name: str, trust_remote_code: bool, arguments: dict[str, Any]) -> dict[str, Any]:
    """Download a model of the hub, and check it as `check_weights` does before any weight is read.

    Returns the arguments with the commit that was checked, so that nothing else is loaded; for a folder, as they are.
    """
    if Path(name).expanduser().is_dir():
        return arguments
    folder = download(name, arguments, with_code=trust_remote_code)
    arguments = arguments | {"revision": commit_of(folder)}
    _check_unread(read, name, trust_remote_code, arguments)
    return arguments


def _check_unread(read: Callable[..., Any], name: str, trust_remote_code: bool, arguments: dict[str, Any]) -> None:
    """Call `read` with a model whose weights have no memory; of a quantized one, with the plain class."""
    hub = {key: arguments[key] for key in _HUB_ARGUMENTS if key in arguments}
    kept = {key: value for key, value in arguments.items() if key not in _PLACEMENT} | {"device_map": {"": "meta"}}
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except UNREADABLE as error:
        raise ModelError(f"model {name!r} cannot be loaded: {error}") from error
    with quiet_loading():
        read(name, trust_remote_code, kept, as_plain=config.get("quantization_config") is not None)


def _read_causal(
    name: str, trust_remote_code: bool, arguments: dict[str, Any], *, as_plain: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Return a causal model, complete but for what it carries, and the arguments that it was loaded with.

    `as_plain`: read a quantized folder as a model that is not, whose quantized weights then do not fit and are not
    checked.
    """
    _check_folder(name, arguments)
    try:
        arguments = _with_text_config(name, MODEL_FOR_CAUSAL_LM_MAPPING, trust_remote_code, arguments)
        arguments = _without_quantization(name, trust_remote_code, arguments) if as_plain else arguments
        model, report = auto_class(_class_of_config(name, arguments)).from_pretrained(
            name, **REPORTING, trust_remote_code=trust_remote_code, **arguments
        )
    except UNREADABLE as error:
        raise ModelError(f"model {name!r} cannot be loaded: {error}") from error
    report = unquantized_part(report) if as_plain else report
    refuse_missing(name, set(report["missing_keys"]), report["mismatched_keys"])
    return model, arguments


def _read_scalar(
    name: str, trust_remote_code: bool, arguments: dict[str, Any], *, as_plain: bool = False
) -> tuple[Any, dict[str, Any], bool]:
    """Return a model with a head of one label as `_read_causal` does, and whether it had that head."""
    _check_folder(name, arguments)
    _refuse_without_scalar_class(name, arguments)
    try:
        arguments = _with_text_config(name, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, trust_remote_code, arguments)
        arguments = _without_quantization(name, trust_remote_code, arguments) if as_plain else arguments
        if "config" in arguments:
            arguments["config"].num_labels = 1
        else:
            arguments["num_labels"] = 1
        with quiet_loading():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, **REPORTING, trust_remote_code=trust_remote_code, **arguments
            )
    except UNREADABLE as error:
        raise ModelError(f"model {name!r} cannot be loaded as one with a scalar head: {error}") from error
    report = unquantized_part(report) if as_plain else report
    missing = set(report["missing_keys"])
    several = next((stored for key, stored, _ in report["mismatched_keys"] if key == "score.weight"), None)
    if several is not None:
        raise ModelError(f"model {name!r} has a head of {several[0]} labels, and a scalar head has one")
    refuse_missing(name, missing - {"score.weight"}, report["mismatched_keys"])
    return model, arguments, "score.weight" not in missing


def _check_folder(name: str, arguments: dict[str, Any]) -> None:
    """Check the files of a folder, or of a hub id in the cache, by their names and headers."""
    refuse_pickles(name)
    if (folder := cached_folder(name, arguments.get("revision"))) is not None:
        refuse_integers(name, folder)


def _without_quantization(name: str, trust_remote_code: bool, arguments: dict[str, Any]) -> dict[str, Any]:
    hub = {key: arguments[key] for key in _HUB_ARGUMENTS if key in arguments}
    config: Any = copy.deepcopy(arguments.get("config"))
    if config is None:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return {**arguments, "config": config}


def whole_architecture(model: PreTrainedModel, whole: dict[str, Any]) -> str:
    """Return the class name for a folder with the composite config `whole` and `model`'s weights."""
    config_class = whole_config_class(whole)
    is_scalar = hasattr(model, "score") and not model.can_generate()
    named = next(iter(whole.get("architectures") or ()), None)
    if named is not None and named.endswith(_SCALAR) is is_scalar:
        return str(named)
    classes: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if is_scalar else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return str(classes[config_class].__name__ if config_class in classes else type(model).__name__)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers while loading, because it reports intended changes, such as a new head, as faults."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _loaded(name: str, model: PreTrainedModel, arguments: dict[str, Any]) -> PreTrainedModel:
    carry(model, name, revision=arguments.get("revision"))
    if (folder := cached_folder(name, arguments.get("revision"))) is not None:
        note_commit(name, commit_of(folder))
        restore_float32(model, folder)
    refuse_nonfinite(name, model.named_parameters())
    return model


def saved_weights(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Return the weights that a checkpoint's folder holds for `model`, in float32; ModelError if they are not all of them."""
    check_files(folder)
    kind: Any = type(model)
    loaded, report = kind.from_pretrained(folder, dtype=torch.float32, **REPORTING, **SAFE)
    refuse_missing(str(folder), set(report["missing_keys"]), report["mismatched_keys"])
    refuse_nonfinite(str(folder), loaded.named_parameters())
    return loaded.state_dict()  # type: ignore[no-any-return]


def _class_of_config(name: str, arguments: dict[str, Any]) -> type[PreTrainedConfig] | None:
    """Return transformers' class of the config that the model will be loaded with; None for one of remote code."""
    if "config" in arguments:
        return type(arguments["config"])
    hub = {key: arguments[key] for key in ("revision",) if key in arguments}
    return whole_config_class(PreTrainedConfig.get_config_dict(name, **hub)[0])


def _refuse_without_scalar_class(name: str, arguments: dict[str, Any]) -> None:
    try:
        found: Any = _class_of_config(name, arguments)
    except UNREADABLE:  # which loading says better
        return
    if found in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and found not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"model {name!r}: transformers has no class with a scalar head for {found.model_type}; take a text model, or "
            "Qwen3.5, as reward model and critic"
        )


def _with_text_config(name: str, classes: Any, trust_remote_code: bool, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return `arguments` with the text config of a composite checkpoint, so that the text-only class is loaded."""
    hub = {key: arguments[key] for key in ("revision",) if key in arguments}
    raw, _ = PreTrainedConfig.get_config_dict(name, **hub)
    if "config" in arguments or not isinstance(raw.get("text_config"), dict) or whole_config_class(raw) is None:
        return arguments
    loading = {key: arguments[key] for key in _DTYPE_ARGUMENTS if key in arguments}
    others = {key: value for key, value in arguments.items() if key not in loading}
    whole: Any
    whole, others = AutoConfig.from_pretrained(
        name, return_unused_kwargs=True, trust_remote_code=trust_remote_code, **others
    )
    text = whole.get_text_config()
    if text is whole or type(text) not in classes or not is_read_from_whole(classes[type(text)]):
        return arguments
    # The class of the whole goes by the entry of the whole, and its checkpoint has one weight for both then.
    text.tie_word_embeddings = text.tie_word_embeddings or whole.tie_word_embeddings
    if text.dtype is None:
        text.dtype = whole.dtype
    if getattr(whole, "quantization_config", None) is not None:
        text.quantization_config = whole.quantization_config
    return {**others, **hub, **loading, "config": text}
