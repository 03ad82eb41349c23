"""Check the files of a model's folder before a library opens them, because anybody may have written them.

An index of shards may name any file, and transformers would open a `.bin` that it names as pickle; JSON may be nested
without end; a file may be cut, a pipe, or a link to a device. None of it is opened here but by a parser that reads data.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from rlqwen.config.usable_values import real_path
from rlqwen.errors import ModelError, quoted

UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, ArithmeticError, RecursionError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers and the tokenizers raise for files of a model that hold anything else than they expect."""
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json",
    "added_tokens.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json",
)  # fmt: skip
"""Files that hold a JSON object."""
_LARGEST = 1 << 28
"""Most bytes of a JSON file; a tokenizer of 250,000 tokens has 20 MB."""


def check_files(folder: Path) -> None:
    """Raise ModelError for a file of a model's folder that is not what its name says; weights are not read."""
    for name in _OBJECTS:
        if (folder / name).exists():
            read_object(folder / name)
    for path in weight_files(folder):
        check_weight_file(path)
    if (folder / "adapter_config.json").exists() and (folder / "config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter_config.json beside the model, and transformers would load the base that it names "
            f"({quoted(read_object(folder / 'adapter_config.json').get('base_model_name_or_path'))}) in its place: move "
            "the adapter's files to a folder of their own, or merge it into the model"
        )


def read_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; raise ModelError unless it is a file with an object."""
    _require_file(path)
    if (size := path.stat().st_size) > _LARGEST:
        raise ModelError(f"{path} has {size:,} bytes, and at most {_LARGEST:,} are read: is it another file?")
    try:
        value = json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply to be read; copy it again") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({type(error).__name__}: {error}); copy it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object; copy it again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Return the files that `from_pretrained` reads, some of which may be missing.

    A checkpoint's folder also has other safetensors files. Raises ModelError for an index that names anything else than
    safetensors files in the folder.
    """
    single, index = folder / _SINGLE, folder / INDEX
    if single.exists():
        return [single]
    if index.exists():
        return _indexed(folder, index)
    return sorted(folder.glob("*.safetensors"))


def check_weight_file(path: Path) -> None:
    """Raise ModelError unless a safetensors file is there and as long as its header says; missing ones are passed over."""
    if not path.exists():
        return
    _require_file(path)
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file ({error}); copy it again"
        ) from None


def _indexed(folder: Path, index: Path) -> list[Path]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise ModelError(f"{index} has no weight_map from weights to files; copy it again")
    files = []
    for name in sorted({name if isinstance(name, str) else quoted(name) for name in names.values()}):
        if not name.endswith(".safetensors") or "/" in name or "\0" in name:
            raise ModelError(
                f"{index} names {quoted(name)}: only safetensors files in the folder itself are read, because other "
                "formats can run code and other places may be anybody's"
            )
        if not _is_within(folder, folder / name):
            raise ModelError(
                f"{index} names {quoted(name)}, which links out of the folder, to {str(real_path(folder / name))!r}: put "
                "the file itself there"
            )
        files.append(folder / name)
    return files


def _is_within(folder: Path, path: Path) -> bool:
    """Return whether a file lies in its folder; a snapshot in the hub's cache links to the blobs beside it."""
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    return real_path(path).is_relative_to(real_path(home))


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path} is not a file, but a folder, a pipe, a device, or a link to one or to nothing")
