"""Find models in folders and on the hub, by revision and never as pickles; record their commits; check vocabularies."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from rlqwen.errors import ModelError
from rlqwen.models.folder_files import check_files, check_weight_file, read_object, weight_files

SAFE = {"use_safetensors": True}
"""Arguments of every `from_pretrained` that loads weights."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WEIGHT_NAMES = ("pytorch_model", "model", "consolidated", "adapter_model", "tf_model", "flax_model")

_DOWNLOAD_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")

_commits: dict[str, str] = {}


@dataclass(frozen=True)
class StoredTensor:
    """Locate a tensor in a safetensors file."""

    path: Path
    dtype: str
    """As safetensors names it: `BF16`."""
    shape: tuple[int, ...]
    span: tuple[int, int]
    """First byte in the file, and the one after the last."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the folder's config.json; empty if there is none."""
    path = Path(folder) / "config.json"
    return read_object(path) if path.is_file() else {}


def is_tied(config: dict[str, Any]) -> bool:
    """Return whether head and embedding are one weight; config.json may say so at the top or in its text config."""
    return any(part.get("tie_word_embeddings", False) for part in (config, config.get("text_config") or {}))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the weights of a model's folder by name, from the headers of its safetensors files; empty without any.

    Raises ModelError for a file that is missing or not whole.
    """
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        if not path.exists():
            raise ModelError(f"model {str(folder)!r} lacks {path.name}, which its index names; copy it again")
        check_weight_file(path)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                stored[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), (start, end))
    return stored


def split_revision(name_or_path: str) -> tuple[str, str | None]:
    """Split `owner/model@revision` in its two parts; a folder, or a name without `@`, has no revision."""
    name, at, revision = name_or_path.rpartition("@")
    if not at or not name or not revision or Path(name_or_path).expanduser().exists():
        return name_or_path, None
    return name, revision


def pinned(name_or_path: str, arguments: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments for `from_pretrained`, with the revision in the name, and safetensors only.

    Raises ModelError for a folder that holds weights as pickle alone, and for arguments that ask for pickle.
    """
    arguments = dict(arguments or {})
    if arguments.get("use_safetensors") is False:
        raise ModelError("use_safetensors: false would load pickle, which can run code; rlqwen loads safetensors only")
    name, revision = split_revision(name_or_path)
    refuse_pickles(name)
    return name, arguments | ({"revision": revision} if revision else {}) | SAFE


def refuse_pickles(name_or_path: str | Path) -> None:
    """Raise ModelError, with the way to convert it, if a folder has its weights or adapter only as a pickle, and for files
    that cannot be opened safely (see rlqwen.models.folder_files)."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return
    names = [path.name for path in folder.iterdir()]
    for is_adapter in (True, False):
        mine = [name for name in names if name.startswith("adapter_model") is is_adapter]
        pickles = sorted(name for name in mine if name.endswith(_PICKLES) and name.startswith(_WEIGHT_NAMES))
        if not pickles or any(name.endswith(".safetensors") for name in mine):
            continue
        what = "AutoPeftModel" if is_adapter else "AutoModelForCausalLM"
        package = "peft" if is_adapter else "transformers"
        raise ModelError(
            f"{folder} holds weights as pickle only ({', '.join(pickles[:3])}), which can run code when it is loaded; "
            "rlqwen loads safetensors only. If you trust its origin, convert it once: "
            f'python -c "from {package} import {what} as M; '
            f"M.from_pretrained({str(folder)!r}).save_pretrained('{folder.name}-safetensors')\""
        )
    check_files(folder)


def download(name: str, arguments: Mapping[str, Any], *, with_code: bool = False) -> Path:
    """Return the folder of a hub id in the cache, after a download if needed, with its files checked as any folder's are.

    `arguments`: of `from_pretrained`. `with_code`: also the Python files. Raises ModelError, also for a repository without
    weights as safetensors, for which transformers would take those that a bot has converted.
    """
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", *(["*.py"] if with_code else [])]
    options: dict[str, Any] = {key: arguments[key] for key in _DOWNLOAD_ARGUMENTS if key in arguments}
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, **options))
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(f"model {name!r} is no folder here and cannot be downloaded: {error}") from error
    inner = folder / (arguments.get("subfolder") or "")
    refuse_pickles(inner)
    files = weight_files(inner)
    lacking = [file.name for file in files if not file.exists()]
    if lacking or not files:
        raise ModelError(
            f"model {name!r} of the hub lacks {', '.join(lacking[:3]) or 'weights as safetensors'}; rlqwen loads no others"
        )
    return folder


def note_dataset(name: str, dataset: Any) -> None:
    """Remember the hub's commit of a dataset; a local one has none."""
    info = getattr(dataset, "info", None)
    urls = getattr(info, "download_checksums", None) or ()
    note_commit(name, next((url.partition("@")[2].partition("/")[0] for url in urls if "@" in url), None))


def note_commit(name: str, commit: str | None) -> None:
    """Remember the hub's commit of a model or dataset, if there is one."""
    if commit:
        _commits[name] = commit


def commit_of(snapshot: Path) -> str | None:
    """Return the commit of a folder in the hub's cache; None for any other folder."""
    return snapshot.name if snapshot.parent.name == "snapshots" else None


def commits() -> dict[str, str]:
    """Return hub id -> commit for every model and dataset that this process has loaded."""
    return dict(_commits)


def check_vocabulary(tokenizer: Any, config: Any, what: str) -> None:
    """Raise ModelError if the tokenizer has tokens for which the model of `config` has no row in its embedding.

    `what`: names the model in the message. A model may have more rows than tokens, as Qwen's do.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_rows = getattr(text_config, "vocab_size", None)  # a user's own model may not have it
    beyond = (
        {}
        if num_rows is None
        else {index: token for token, index in tokenizer.get_vocab().items() if index >= num_rows}
    )
    if beyond:
        raise ModelError(
            f"{what}: its tokenizer has {len(tokenizer):,} tokens and its embedding {num_rows:,} rows, so that "
            f"{len(beyond):,} tokens, the first {beyond[min(beyond)]!r}, have none: save the model after "
            "model.resize_token_embeddings(len(tokenizer)), or use the tokenizer that came with it"
        )
