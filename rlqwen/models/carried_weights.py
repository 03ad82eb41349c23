"""Keep the weights of a checkpoint that the trained class has no place for, such as a vision tower, unchanged.

A Qwen3.5 folder holds a vision tower and weights for multi-token prediction, and the text-only class, which rlqwen
trains, ignores both. They are copied, byte for byte and under their names, from the folder that the model came from
into every folder that it is written to, with the config of the whole and the files of the processor.

The files are opened when the model is loaded and read when a folder is written, so they take no memory. The source
folder may be moved, deleted or replaced meanwhile, because the open files stay readable; a file that is overwritten in
place causes an error.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from rlqwen.errors import ModelError
from rlqwen.models.hub import commit_of, read_config, split_revision, stored_tensors
from rlqwen.models.stored_weight import DTYPES, OpenFile, StoredWeight
from rlqwen.models.vision_language import towers

_ATTRIBUTE = "_rlqwen_carried"
_CONFIG_FILE = "config.json"
_PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_KINDS = {"visual": "vision tower", "vision_tower": "vision tower", "mtp": "multi-token prediction"}
"""Part of a weight's name -> what users call such weights."""
_OF_THE_WHOLE = {"num_labels", "id2label", "label2id", "problem_type"}
"""Entries that a class with a head reads from the top of a composite config."""
_NOT_MERGED = {
    "architectures", "dtype", "model_type", "quantization_config", "transformers_version", "_name_or_path",
}  # fmt: skip


@dataclass(eq=False)
class CarriedWeights:
    """Hold the weights that a model carries; copies of a model share one instance."""

    source: str
    """The source of the weights, for messages."""
    weights: dict[str, StoredWeight | Tensor] = field(default_factory=dict)
    """Name in the checkpoint -> weight; a tensor if the model was given as an object that holds it."""
    whole_config: dict[str, Any] | None = None
    """config.json of the class that has a place for all weights; None if that of the trained class is the same."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Name -> content of the processor's files."""
    obstacle: str | None = None
    """Why no folder can be written with them; None if one can."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "CarriedWeights":
        return self

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as they are in the source; SaveError if a file has been overwritten."""
        for name in self.weights:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """Return one weight as it is in the source; SaveError if its file has been overwritten."""
        weight = self.weights[name]
        return weight if isinstance(weight, Tensor) else weight.read()

    def digest(self) -> str | None:
        """Return a digest of names, dtypes, shapes and bytes; None without weights."""
        if not self.weights:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.tensors()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def require_writable(self) -> None:
        """Raise ModelError if no folder can be written with these weights."""
        if self.obstacle is not None:
            raise ModelError(self.obstacle)

    def counts(self) -> dict[str, int]:
        """Return the number of parameters by kind, in users' words."""
        counts: dict[str, int] = {}
        for name, weight in self.weights.items():
            shape = weight.shape if isinstance(weight, Tensor) else weight.entry.shape
            kind = kind_of(name)
            counts[kind] = counts.get(kind, 0) + torch.Size(shape).numel()
        return counts

    def summary(self) -> str | None:
        """Return one line about the weights that are kept; None if there are none."""
        if not self.weights:
            return None
        largest_first = sorted(self.counts().items(), key=lambda entry: -entry[1])
        parts = " and ".join(f"{kind} ({count_text(number)} parameters)" for kind, number in largest_first)
        kept = f"not trained, and copied unchanged to every folder that is written: {parts} of {self.source}"
        if "vision tower" in self.counts() and not self.files:
            kept += f"; but no {_PROCESSOR_FILES[0]} was found there, without which a folder does not load for images"
        return kept

    def config_of(self, config: PreTrainedConfig, architecture: str, dtype: torch.dtype) -> dict[str, Any]:
        """Return `whole_config` with training's changes to its text config; `dtype`: dtype of the trained weights."""
        assert self.whole_config is not None
        whole = copy.deepcopy(self.whole_config)
        text = whole["text_config"]
        before, now = _plain(type(config)(**copy.deepcopy(text))), _plain(config)
        for key, value in now.items():
            if key in _NOT_MERGED or before.get(key) == value:
                continue
            text[key] = value
            if key in whole or key in _OF_THE_WHOLE:
                whole[key] = value
        whole["architectures"] = [architecture]
        for part in (whole, text):
            part.pop("torch_dtype", None)
            part["dtype"] = str(dtype).removeprefix("torch.")
        quantization = now.get("quantization_config")
        whole.pop("quantization_config", None)
        text.pop("quantization_config", None)
        return whole if quantization is None else whole | {"quantization_config": quantization}


def carry(model: Any, source: str | Path, *, revision: str | None = None) -> bool:
    """Let `model` carry the weights of the checkpoint `source` that its class ignores; a folder or a cached hub id.

    Returns whether the source was found.
    """
    folder = cached_folder(str(source), revision) if str(source) else None
    if folder is None or not (folder / _CONFIG_FILE).is_file():
        return False
    stored = stored_tensors(folder)
    ignored = set() if towers(model) else ignored_names(stored, type(model.config), model)
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    names = [name for name in stored if name in ignored and name not in own]
    _forget_foreign_conversions(model, [name for name in stored if name not in ignored])
    raw = read_config(folder)
    obstacle = None
    if names and (raw.get("quantization_config") is not None or {stored[name].dtype for name in names} - set(DTYPES)):
        obstacle = (
            f"model {str(source)!r} is quantized, with weights ({kind_of(names[0])}) that are copied as they are and would not fit "
            "the plain weights beside them: start from the unquantized model, with model.quantization if memory is short"
        )
    is_part = isinstance(raw.get("text_config"), dict) and raw.get("model_type") != model.config.model_type
    processor = processor_files(folder) or (_downloaded_processor(str(source), folder) if names else {})
    if not names and not is_part and not processor:
        return True
    files = {path.name: path for path in {stored[name].path for name in names}}
    opened = {name: OpenFile(path) for name, path in files.items()}
    vars(model)[_ATTRIBUTE] = CarriedWeights(
        str(source),
        {name: StoredWeight(opened[stored[name].path.name], stored[name]) for name in names},
        raw if is_part else None,
        processor,
        obstacle,
    )
    return True


def carried_by(model: Any) -> CarriedWeights | None:
    """Return what `model`, or the model under an adapter, carries; None if nothing has been found yet."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: CarriedWeights | None = vars(base).get(_ATTRIBUTE)
    return found


def set_carried(model: Any, carried: CarriedWeights) -> None:
    """Let `model` carry these weights."""
    vars(model)[_ATTRIBUTE] = carried


def ignored_names(names: Iterable[str], config_class: type[PreTrainedConfig] | None, model: Any = None) -> set[str]:
    """Return the names in a checkpoint that the text-only class, or the class of `model`, ignores on purpose.

    `config_class`: of the checkpoint, or of its text model; None: one that transformers does not know.
    """
    patterns: set[str] = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    text_class: Any = config_class and config_class.sub_configs.get("text_config", config_class)
    if text_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[text_class]
        patterns |= set(model_class._keys_to_ignore_on_load_unexpected or ())
    expressions = [re.compile(pattern) for pattern in patterns]
    return {name for name in names if any(expression.search(name) for expression in expressions)}


def ignored_in_folder(folder: Path, names: Iterable[str]) -> set[str]:
    """Return the names in a folder that its text-only class ignores on purpose; loads no weights."""
    return ignored_names(names, whole_config_class(read_config(folder)))


def processor_files(folder: Path) -> dict[str, bytes]:
    """Return name -> content of the files that a processor of images is loaded from; they are small."""
    return {name: (folder / name).read_bytes() for name in _PROCESSOR_FILES if (folder / name).is_file()}


def _downloaded_processor(source: str, snapshot: Path) -> dict[str, bytes]:
    """Return the processor's files from the hub, of the same commit, because loading a model does not download them."""
    if not (commit := commit_of(snapshot)):
        return {}
    try:
        name, patterns = split_revision(source)[0], list(_PROCESSOR_FILES)
        return processor_files(Path(snapshot_download(name, revision=commit, allow_patterns=patterns)))
    except (OSError, ValueError, HFValidationError):
        return {}


def whole_config_class(config: Mapping[str, Any]) -> type[PreTrainedConfig] | None:
    """Return transformers' class of a config.json; None for one that it does not know."""
    try:
        return CONFIG_MAPPING[config.get("model_type", "")]  # a lazy mapping: its `get` finds nothing
    except KeyError:
        return None


def _forget_foreign_conversions(model: Any, own: Iterable[str]) -> None:
    """Drop conversions that transformers recorded while loading for weights that the model does not hold.

    Saving reverses every recorded conversion: fused experts of the checkpoint would be saved one by one if those of its
    multi-token prediction are stored one by one.
    """
    conversions = vars(model).get("_weight_conversions")
    if conversions:
        own = list(own)
        model._weight_conversions = [
            each for each in conversions if any(each.rename_source_key(name)[1] is not None for name in own)
        ]


def cached_folder(source: str, revision: str | None) -> Path | None:
    """Return the folder of a model: a local one, or one in the hub's cache; nothing is downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name, named = split_revision(source)
    try:
        return Path(snapshot_download(name, revision=named or revision, local_files_only=True))
    except (OSError, ValueError, HFValidationError):
        return None


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def kind_of(name: str) -> str:
    """Return what users call the part that a weight of this name belongs to."""
    parts = name.split(".")
    return next((_KINDS[part] for part in parts[:-1] if part in _KINDS), parts[0])


def count_text(number: int) -> str:
    """Return a large number as short text, such as `1.5 B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
