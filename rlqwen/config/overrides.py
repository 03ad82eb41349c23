"""Change keys of recipes by `key.path=value`, as the command line gives it."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from rlqwen.config import Recipe, TrainerConfig
from rlqwen.config.algorithms import short_name
from rlqwen.config.yaml_dialect import parse_yaml
from rlqwen.errors import ConfigError, quoted
from rlqwen.plugins.kinds import TRAINERS
from rlqwen.terminal import warn


@dataclass(frozen=True)
class Override:
    """A `key.path=value` of the command line."""

    text: str
    algorithm: str | None
    """`grpo` in `grpo.train.max_steps=5`: meant for recipes of that algorithm only."""
    path: tuple[str, ...]
    value: Any


def parse_override(text: str, algorithms: Collection[str] = ()) -> Override:
    """Split `key.path=value`; the value is read as YAML (`null`, `true`, `1e-4`, `[a, b]`, `{r: 8}`).

    `algorithms`: names that `key.path` may begin with, besides registered ones.
    """
    key, equals, value = text.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(f"override {text!r} is not of the form key.path=value, such as train.learning_rate=1e-5")
    is_algorithm = parts[0] not in Recipe.model_fields and (parts[0] in algorithms or parts[0] in TRAINERS.discover())
    algorithm = parts[0] if is_algorithm else None
    path = parts[1:] if algorithm else parts
    if not path:
        raise ConfigError(f"override {text!r} names an algorithm and no key; write {parts[0]}.train.max_steps=10")
    try:
        return Override(text, algorithm, path, parse_yaml(value))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"override {text!r}: the value {value!r} is not YAML: {error.problem}; quote it") from None


def fits(override: Override, config: type[TrainerConfig] | None) -> bool:
    """Return whether a recipe has such a key; what is inside free-form mappings always fits."""
    if config is None:
        return False
    first, *rest = override.path
    if first == "train":
        return not rest or _has_path(config, rest)
    if first in Recipe.sections_of(config):
        return _has_path(config, [first, *rest])
    return _has_path(Recipe, [first, *rest])


def _has_path(model: type[BaseModel], path: Sequence[str]) -> bool:
    if path[0] not in model.model_fields:
        return False
    rest = [part for part in path[1:] if not part.isdigit()]
    inner = [kind for kind in _flatten(model.model_fields[path[0]].annotation) if _is_model(kind)]
    return not rest or not inner or any(_has_path(kind, rest) for kind in inner)


def _flatten(annotation: Any) -> list[Any]:
    inside = get_args(annotation)
    return [annotation] if not inside else [kind for part in inside for kind in _flatten(part)]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def continues_earlier(override: Override, place: int, raws: Sequence[dict[str, Any]]) -> bool:
    """Return whether the value that the override would replace is the result of an earlier recipe; warn if so."""
    value: Any = raws[place]
    for part in override.path:
        value = value.get(part) if isinstance(value, dict) else None
    earlier = [raw.get("output_dir") for raw in raws[:place]]
    if not isinstance(value, str) or not any(isinstance(of, str) and Path(value).is_relative_to(of) for of in earlier):
        return False
    key, algorithm = ".".join(override.path), short_name(str(raws[place].get("algorithm")))
    warn(
        f"{override.text} does not reach the {algorithm} recipe, which continues from {value}; "
        f"write {algorithm}.{key}=... to change that",
        stacklevel=4,
    )
    return True


def follow_section(override: Override, raw: dict[str, Any], sections: Collection[str]) -> Override:
    """Point an override at the place of its section in the recipe, which may be the top or `train`."""
    train: Any = raw.get("train")
    train = train if isinstance(train, dict) else {}
    path = override.path
    if path[0] == "train" and len(path) > 1 and path[1] in sections and path[1] in raw and path[1] not in train:
        return replace(override, path=path[1:])
    if path[0] in sections and path[0] in train and path[0] not in raw:
        return replace(override, path=("train", *path))
    return override


def assign(values: dict[str, Any], override: Override) -> None:
    """Set the value at the override's path, and make mappings on the way; a number is an index into a list."""
    holder: Any = values
    for depth, part in enumerate(override.path):
        last = depth == len(override.path) - 1
        so_far = ".".join(override.path[:depth])
        if isinstance(holder, list):
            if not part.isdigit() or int(part) >= len(holder):
                raise ConfigError(
                    f"override {override.text!r}: {so_far!r} is a list of {len(holder)}; "
                    f"{part!r} is not an index into it (indices begin at 0)"
                )
            key: Any = int(part)
        elif isinstance(holder, dict):
            key = part
        else:
            raise ConfigError(
                f"override {override.text!r}: {so_far!r} is {quoted(holder)}, which has no {part!r} inside"
            )
        if last:
            holder[key] = override.value
        elif isinstance(holder, dict) and holder.get(key) is None:
            inner: dict[str, Any] = {}
            holder[key] = inner
            holder = inner
        else:
            holder = holder[key]


def locate_fault(line: str, path: Path, overrides: Sequence[Override]) -> str:
    """Prefix a fault with the source of its value: an override, or the file."""
    for override in overrides:
        parent, leaf = ".".join(override.path[:-1]), override.path[-1]
        own_key = f"{parent}.{leaf}" if parent else leaf
        unknown = re.match(rf"({re.escape(parent)}: )?(unknown key )?'{re.escape(leaf)}'", line)
        if line.startswith((f"{own_key}:", f"{own_key}.")) or (unknown and bool(unknown[1]) == bool(parent)):
            return f"override {override.text!r} of {path}: {line}"
    return f"{path}: {line}"
