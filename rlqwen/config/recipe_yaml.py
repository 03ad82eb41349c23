"""YAML recipes: found by path or by name, changed by dotted overrides, written back resolved.

    recipe = load_recipe("quickstart_grpo", ["train.learning_rate=1e-4", "rewards.0.weight=2"])
    write_resolved(recipe, Path(recipe.output_dir) / "recipe.yaml")

Relative paths inside a recipe are meant from the working directory.
"""

import difflib
import re
import warnings
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from rlqwen.config import Recipe, TrainerConfig
from rlqwen.config.algorithms import config_class, short_name
from rlqwen.errors import ConfigError
from rlqwen.plugins.kinds import TRAINERS
from rlqwen.secrets import redact_values


@dataclass(frozen=True)
class Override:
    """One `key.path=value` of the command line."""

    text: str
    algorithm: str | None
    """`grpo` in `grpo.train.max_steps=5`: meant for recipes of that algorithm only."""
    path: tuple[str, ...]
    value: Any


@dataclass(frozen=True)
class PackagedRecipe:
    """A recipe that comes with rlqwen."""

    name: str
    path: Path
    description: str
    """The first comment line of the file."""


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read one recipe; raises ConfigError that names file, key path, value and the nearest known key."""
    return load_recipes([path_or_name], overrides)[0]


def load_recipes(paths_or_names: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[Recipe]:
    """Read the recipes of a pipeline.

    Each override goes to every recipe that has such a key (`train.num_generations` reaches no SFT recipe); one that
    begins with an algorithm's name (`sft.train.max_steps=10`) goes to recipes of that algorithm only. A value that lies in
    the output folder of an earlier recipe is kept, with a warning, unless the override names the algorithm:
    `model.path=...` is where a pipeline begins, not each of its stages. An override that fits none is an error.
    """
    files = [find_recipe(path_or_name) for path_or_name in paths_or_names]
    raws = [_read_mapping(file) for file in files]
    configs = [_config_or_none(raw) for raw in raws]
    names = [short_name(str(raw.get("algorithm"))) for raw in raws]
    parsed = [parse_override(text, names) for text in overrides]
    fitting: list[list[Override]] = [[] for _ in raws]
    for override in parsed:
        meant = [place for place, name in enumerate(names) if override.algorithm in (None, name)]
        homes = [place for place in meant if _fits(override, configs[place])]
        if len(homes) > 1 and override.algorithm is None:
            homes = [home for home in homes if not _continues_earlier(override, home, raws)]
        if not homes:
            # A recipe of the right algorithm says best what is wrong with the key.
            homes = meant[-1:]
        if not homes:
            algorithms = ", ".join(str(raw.get("algorithm")) for raw in raws)
            raise ConfigError(f"override {override.text!r} fits no recipe: their algorithms are {algorithms}")
        for home in homes:
            fitting[home].append(override)
    recipes = [
        _build(file, raw, config, own) for file, raw, config, own in zip(files, raws, configs, fitting, strict=True)
    ]
    _refuse_shared_folders(files, recipes)
    return recipes


def find_recipe(path_or_name: str | Path) -> Path:
    """A file if there is one of that path, else the packaged recipe of that name."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    packaged = list_recipes()
    for recipe in packaged:
        if recipe.name == str(path_or_name):
            return recipe.path
    names = [recipe.name for recipe in packaged]
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"packaged recipes: {', '.join(names)}"
    what = "is a folder, not a recipe file" if path.is_dir() else "is neither a file nor a packaged recipe"
    raise ConfigError(f"recipe {str(path_or_name)!r} {what}; {hint}")


def list_recipes() -> list[PackagedRecipe]:
    """The recipes that come with rlqwen, by name."""
    package = Path(__file__).parents[1]
    in_wheel, in_checkout = package / "_recipes", package.parent / "recipes"
    folder = in_wheel if in_wheel.is_dir() else in_checkout
    return [PackagedRecipe(file.stem, file, _first_comment(file)) for file in sorted(folder.glob("*.yaml"))]


def is_recipe(name: str) -> bool:
    """Whether a word of the command line means a recipe, by file or by name, and not data."""
    return Path(name).suffix in {".yaml", ".yml"} or name in {recipe.name for recipe in list_recipes()}


def copy_recipe(name: str, target: str | Path = ".") -> Path:
    """Copy a packaged recipe to a file or into a folder, and return the new path. Nothing is overwritten.

    The copy is a user's own, so it does not carry `overwrite_output_dir`, which only lets a quickstart run again.
    """
    source = find_recipe(name)
    target = Path(target)
    destination = target if target.suffix in {".yaml", ".yml"} and not target.is_dir() else target / source.name
    if destination.exists():
        raise ConfigError(f"{destination} exists already; give another target, or remove it first")
    destination.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"(?m)^ +overwrite_output_dir:.*\n", "", source.read_text("utf-8"))
    destination.write_text(text, encoding="utf-8")
    return destination


def write_resolved(recipe: Recipe, path: str | Path) -> None:
    """Write the recipe with every default filled in; `load_recipe` reads it back as an equal recipe, unless it holds a
    secret of the environment, which is not written."""
    values = recipe.model_dump(mode="json")
    train = values.pop("train")
    output_dir = values.pop("output_dir")
    train.pop("output_dir", None)
    for section in Recipe.sections_of(type(recipe.train)):
        values[section] = train.pop(section)
    values |= {"train": train, "output_dir": output_dir}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = yaml.dump(redact_values(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    Path(path).write_text(text, encoding="utf-8")


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
        return Override(text, algorithm, path, yaml.load(value, _Loader))
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"override {text!r}: the value {value!r} is not YAML: {problem}; quote it") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `1e-4` as a number."""


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes the strings which `_Loader` would read as numbers."""


_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+[eE][-+]?[0-9]+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, which flatten_mapping resolves
            continue
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice, first on line {seen[key]}", key_node.start_mark
            )
        seen[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise ConfigError(f"{where}: {error.problem or 'not valid YAML'}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        found = "an empty file" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path}: a recipe is a mapping that begins with `algorithm:`, but this is {found}")
    return values


def _refuse_shared_folders(files: Sequence[Path], recipes: Sequence[Recipe]) -> None:
    owners: dict[Path, Path] = {}
    for file, recipe in zip(files, recipes, strict=True):
        folder = Path(recipe.output_dir).resolve()
        if folder in owners:
            name = short_name(recipe.algorithm)
            raise ConfigError(
                f"{file}: output_dir: {recipe.output_dir!r} is the run folder of {owners[folder]} too; "
                f"give each its own, such as {name}.output_dir={recipe.output_dir}-{name}"
            )
        owners[folder] = file


def _config_or_none(raw: dict[str, Any]) -> type[TrainerConfig] | None:
    """Return the config class of a recipe's algorithm; None if it has none, which building the recipe reports."""
    try:
        return config_class(str(raw.get("algorithm")))
    except ConfigError:
        return None


def _build(
    path: Path, raw: dict[str, Any], config: type[TrainerConfig] | None, overrides: Sequence[Override]
) -> Recipe:
    if isinstance(raw.get("rewards"), list):
        raw["rewards"] = [{"name": item} if isinstance(item, str) else item for item in raw["rewards"]]
    sections = Recipe.sections_of(config) if config else []
    placed = []
    for override in overrides:
        placed.append(_follow_section(override, raw, sections))
        _assign(raw, placed[-1])
    try:
        return Recipe.parse(raw)
    except ConfigError as error:
        lines = [_locate(line, path, placed) for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from None


def _follow_section(override: Override, raw: dict[str, Any], sections: Collection[str]) -> Override:
    """Point an override at the place of its section in the recipe, which may be the top or `train`."""
    train: Any = raw.get("train")
    train = train if isinstance(train, dict) else {}
    path = override.path
    if path[0] == "train" and len(path) > 1 and path[1] in sections and path[1] in raw and path[1] not in train:
        return replace(override, path=path[1:])
    if path[0] in sections and path[0] in train and path[0] not in raw:
        return replace(override, path=("train", *path))
    return override


def _locate(line: str, path: Path, overrides: Sequence[Override]) -> str:
    """Prefix a fault with where its value came from: an override, or the file."""
    for override in overrides:
        parent, leaf = ".".join(override.path[:-1]), override.path[-1]
        own_key = f"{parent}.{leaf}" if parent else leaf
        unknown = re.match(rf"({re.escape(parent)}: )?(unknown key )?'{re.escape(leaf)}'", line)
        if line.startswith((f"{own_key}:", f"{own_key}.")) or (unknown and bool(unknown[1]) == bool(parent)):
            return f"override {override.text!r} of {path}: {line}"
    return f"{path}: {line}"


def _continues_earlier(override: Override, place: int, raws: Sequence[dict[str, Any]]) -> bool:
    """Return whether the value that the override would replace is the result of an earlier recipe; warn if so."""
    value: Any = raws[place]
    for part in override.path:
        value = value.get(part) if isinstance(value, dict) else None
    earlier = [raw.get("output_dir") for raw in raws[:place]]
    if not isinstance(value, str) or not any(isinstance(of, str) and Path(value).is_relative_to(of) for of in earlier):
        return False
    key, algorithm = ".".join(override.path), short_name(str(raws[place].get("algorithm")))
    warnings.warn(
        f"{override.text} does not reach the {algorithm} recipe, which goes on from {value}; "
        f"write {algorithm}.{key}=... to change that",
        stacklevel=4,
    )
    return True


def _assign(values: dict[str, Any], override: Override) -> None:
    """Set the value at the override's path, making mappings on the way; a number is an index into a list."""
    holder: Any = values
    for depth, part in enumerate(override.path):
        last = depth == len(override.path) - 1
        so_far = ".".join(override.path[:depth])
        if isinstance(holder, list):
            if not part.isdigit() or int(part) >= len(holder):
                raise ConfigError(
                    f"override {override.text!r}: {so_far!r} is a list of {len(holder)}; "
                    f"{part!r} is no index into it (they begin at 0)"
                )
            key: Any = int(part)
        elif isinstance(holder, dict):
            key = part
        else:
            raise ConfigError(f"override {override.text!r}: {so_far!r} is {holder!r}, which has no {part!r} inside")
        if last:
            holder[key] = override.value
        elif isinstance(holder, dict) and holder.get(key) is None:
            inner: dict[str, Any] = {}
            holder[key] = inner
            holder = inner
        else:
            holder = holder[key]


def _fits(override: Override, config: type[TrainerConfig] | None) -> bool:
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


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")
