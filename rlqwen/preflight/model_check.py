"""Check from a model's files alone whether it can be loaded, and read its config and tokenizer."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.config import ModelConfig
from rlqwen.errors import ModelError
from rlqwen.models.folder_files import UNREADABLE, weight_files
from rlqwen.models.hub import check_vocabulary, refuse_pickles
from rlqwen.models.tiny import resolve_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER = ("tokenizer.json", "vocab.json", "tokenizer.model")
_NO_WEIGHTS = "weights (model.safetensors)"
NO_TOKENIZER = "a tokenizer (tokenizer.json)"
_HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class ConfigFacts:
    """The facts of a model's config."""

    path: str
    """A folder or a hub id."""
    options: dict[str, Any]
    """Arguments of every `from_pretrained`."""
    config: Any
    """The whole config of transformers; for a model that also reads images, with text and vision part."""
    context: int
    """Most tokens that the model can attend to."""
    dtype: str
    """Dtype of the saved weights: float32, bfloat16 or float16."""
    num_bytes: int
    """Size of the weight files in bytes; 0 if unknown."""

    @property
    def folder(self) -> Path | None:
        """Return the model's folder on this machine; None if it is on the hub."""
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None


@dataclass(frozen=True)
class ModelFacts(ConfigFacts):
    """The facts about a model that the other checks need."""

    tokenizer: "PreTrainedTokenizerBase"


def check_model_path(path: str, key: str = "model.path") -> None:
    """Raise ModelError unless `path` is a complete model folder, a built-in model, or perhaps a hub id.

    `key`: the key whose value `path` is.
    """
    missing = what_is_missing(path, key)
    if missing:
        raise _incomplete(Path(path).expanduser(), key, missing)


def what_is_missing(path: str, key: str = "model.path") -> list[str]:
    """Return what a folder without any weights lacks for a run, although its config can be checked; otherwise nothing.

    Raises ModelError as `check_model_path` does for anything else that is wrong, such as a missing shard.
    """
    if path.startswith("builtin:"):
        return []
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _check_folder(folder, key)
    if folder.exists():
        raise ModelError(f"{key} {path!r} is a file; give the folder that holds config, weights and tokenizer")
    if not _may_be_hub_id(path):
        raise ModelError(f"{key} {path!r}: there is no such folder{_near_folder(folder)}, and it is not a hub id")
    return []


def check_model(model: ModelConfig, *, scalar: bool = False) -> None:
    """Raise ModelError if a local model lacks weights, has some of another shape, or rows for fewer tokens than its
    tokenizer; no weight is read. A hub id is checked if it is in the cache, otherwise when it is loaded.

    `scalar`: see rlqwen.models.model_classes.check_weights."""
    from rlqwen.models.carried_weights import cached_folder
    from rlqwen.models.model_classes import check_weights

    folder = cached_folder(model.path, model.revision)
    if folder is None:
        return
    check_weights(str(folder), scalar=scalar, trust_remote_code=model.trust_remote_code)
    is_cached = not Path(model.path).expanduser().is_dir()
    if is_cached and not all(any((folder / name).is_file() for name in part) for part in (["config.json"], _TOKENIZER)):
        return
    facts = read_config(model.model_copy(update={"path": str(folder)}), folder)
    if facts is not None:
        read_tokenizer(facts)


def read_model(model: ModelConfig, scratch: Path) -> ModelFacts | None:
    """Read config and tokenizer of a complete model; return None if it is on the hub and cannot be reached.

    `scratch`: a folder to build a built-in model in. Raises ModelError for faults of a local model.
    """
    check_model_path(model.path)
    facts = read_config(model, scratch)
    return None if facts is None else read_tokenizer(facts)


def read_config(model: ModelConfig, scratch: Path) -> ConfigFacts | None:
    """Read the config alone; return None if the model is on the hub and cannot be reached.

    `scratch`: a folder to build a built-in model in. Raises ModelError for a local config that cannot be read, or for a
    model that rlqwen does not support.
    """
    from transformers import AutoConfig

    from rlqwen.models.model_support import check_config

    arguments = model.init_kwargs if model.path.startswith("builtin:") else {}
    path = resolve_model_path(model.path, scratch, **arguments)
    is_local = Path(path).expanduser().is_dir()
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if not is_local:
        options |= {"revision": model.revision or "main", "local_files_only": not _is_on_hub(path, model.revision)}
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except UNREADABLE as error:
        if not is_local:
            return None
        raise ModelError(f"model.path {path!r}: config or tokenizer cannot be read: {error}") from error
    check_config(config)
    text = config.get_text_config()
    dtype = str(config.dtype or text.dtype or "float32").removeprefix("torch.")
    num_bytes = _weight_bytes(Path(path).expanduser()) if is_local else 0
    return ConfigFacts(path, options, config, int(text.max_position_embeddings), dtype, num_bytes)


def read_tokenizer(facts: ConfigFacts) -> ModelFacts | None:
    """Read the tokenizer of a model whose config was read; return None if it is on the hub and cannot be reached.

    Raises ModelError for a local tokenizer that cannot be read, or that has tokens which the embedding lacks.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(facts.path, **facts.options)
    except Exception as error:  # the tokenizers library raises bare ones
        if facts.folder is None:
            return None
        raise ModelError(f"model.path {facts.path!r}: config or tokenizer cannot be read: {error}") from error
    check_vocabulary(tokenizer, facts.config, f"model.path {facts.path!r}")
    return ModelFacts(**vars(facts), tokenizer=tokenizer)


def _is_on_hub(model_id: str, revision: str | None) -> bool:
    """Ask the hub once, without its client's retries; return False if it cannot be reached, so that only the cache is
    left."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(model_id, revision=revision, timeout=_HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(
            f"model.path {model_id!r}{f' at revision {revision!r}' if revision else ''}: there is no such folder here, "
            "and the hub has none that you may read"
        ) from error
    except Exception:  # noqa: BLE001 - the hub's client raises many kinds: a boundary
        return False
    return True


def _check_folder(folder: Path, key: str) -> list[str]:
    """Return what `what_is_missing` does, for a folder."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{key} {str(folder)!r} holds an adapter without its base model; give the base model's folder, "
            "or merge the adapter into it first"
        )
    refuse_pickles(folder)
    has_config = (folder / "config.json").is_file()
    has_weights = any((folder / name).is_file() for name in _WEIGHTS)
    missing = [] if has_config else ["config.json"]
    if not has_weights:
        missing.append(_NO_WEIGHTS)
    if not any((folder / name).is_file() for name in _TOKENIZER):
        missing.append(NO_TOKENIZER)
    missing += [path.name for path in weight_files(folder) if not path.is_file()]
    if missing and (has_weights or not has_config):
        raise _incomplete(folder, key, missing)
    return missing


def _incomplete(folder: Path, key: str, missing: list[str]) -> ModelError:
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
    return ModelError(f"{key} {str(folder)!r} lacks {', '.join(missing)}; it holds {found}")


def _may_be_hub_id(path: str) -> bool:
    """Return whether a path has the form of a hub id, and does not begin with a folder here, which makes it a mistyped
    path."""
    return _HUB_ID.fullmatch(path) is not None and not ("/" in path and Path(path.partition("/")[0]).is_dir())


def _near_folder(folder: Path) -> str:
    parent = folder.parent
    if not parent.is_dir():
        return f" (nor is there {str(parent)!r})"
    near = difflib.get_close_matches(folder.name, [entry.name for entry in parent.iterdir() if entry.is_dir()], n=1)
    return f"; did you mean {str(parent / near[0])!r}?" if near else ""


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
