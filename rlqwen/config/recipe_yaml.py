"""Read recipes from YAML, by path or by name, change them by dotted overrides, and write them back resolved.

    recipe = load_recipe("quickstart_grpo", ["train.learning_rate=1e-4", "rewards.0.weight=2"])
    write_resolved(recipe, Path(recipe.output_dir) / "recipe.yaml")

Relative paths inside a recipe are relative to the working directory.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlqwen.config import Recipe, TrainerConfig
from rlqwen.config.algorithms import config_class, short_name
from rlqwen.config.overrides import (
    Override,
    assign,
    continues_earlier,
    fits,
    follow_section,
    locate_fault,
    parse_override,
)
from rlqwen.config.usable_values import real_path
from rlqwen.config.yaml_dialect import Dumper, read_mapping
from rlqwen.errors import ConfigError
from rlqwen.secrets import redact_values
from rlqwen.terminal import UNSAFE


@dataclass(frozen=True)
class PackagedRecipe:
    """A recipe that comes with rlqwen."""

    name: str
    path: Path
    description: str
    """The first comment line of the file."""


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read one recipe; raise ConfigError that names file, key path, value and the nearest known key."""
    return load_recipes([path_or_name], overrides)[0]


def load_recipes(paths_or_names: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[Recipe]:
    """Read the recipes of a pipeline.

    An override changes every recipe that has its key (`train.num_generations` changes no SFT recipe). One that begins
    with the name of an algorithm (`sft.train.max_steps=10`) changes recipes of that algorithm only. A path inside the
    output folder of an earlier recipe is kept, with a warning, unless the override names the algorithm, because
    `model.path=...` means the start of a pipeline, not the start of each stage. An override that fits no recipe is an
    error.
    """
    files = [find_recipe(path_or_name) for path_or_name in paths_or_names]
    raws = [read_mapping(file) for file in files]
    configs = [_config_or_none(raw) for raw in raws]
    names = [short_name(str(raw.get("algorithm"))) for raw in raws]
    parsed = [parse_override(text, names) for text in overrides]
    fitting: list[list[Override]] = [[] for _ in raws]
    for override in parsed:
        meant = [place for place, name in enumerate(names) if override.algorithm in (None, name)]
        homes = [place for place in meant if fits(override, configs[place])]
        if len(homes) > 1 and override.algorithm is None:
            homes = [home for home in homes if not continues_earlier(override, home, raws)]
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
    """Return the file of that path if there is one, else the packaged recipe of that name."""
    path = Path(path_or_name)
    if os.path.isfile(path):  # noqa: PTH113 - False, and not an error, for a name that no file can have
        return path
    packaged = list_recipes()
    for recipe in packaged:
        if recipe.name == str(path_or_name):
            return recipe.path
    names = [recipe.name for recipe in packaged]
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"packaged recipes: {', '.join(names)}"
    what = "is a folder, not a recipe file" if os.path.isdir(path) else "is neither a file nor a packaged recipe"  # noqa: PTH112
    raise ConfigError(f"recipe {str(path_or_name)!r} {what}; {hint}")


def list_recipes() -> list[PackagedRecipe]:
    """Return the recipes that come with rlqwen, sorted by name."""
    package = Path(__file__).parents[1]
    in_wheel, in_checkout = package / "_recipes", package.parent / "recipes"
    folder = in_wheel if in_wheel.is_dir() else in_checkout
    return [PackagedRecipe(file.stem, file, _first_comment(file)) for file in sorted(folder.glob("*.yaml"))]


def is_recipe(name: str) -> bool:
    """Return whether a word of the command line names a recipe, by file or by name, and not data."""
    return Path(name).suffix in {".yaml", ".yml"} or name in {recipe.name for recipe in list_recipes()}


def copy_recipe(name: str, target: str | Path = ".") -> Path:
    """Copy a packaged recipe to a file or into a folder, and return the new path; never overwrite a file.

    The copy leaves `overwrite_output_dir` out, which is only meant to let a quickstart run again.
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
    """Write the recipe with every default filled in.

    `load_recipe` reads it back as an equal recipe, unless it holds a secret of the environment, which is not written.
    """
    values = recipe.model_dump(mode="json")
    train = values.pop("train")
    output_dir = values.pop("output_dir")
    train.pop("output_dir", None)
    for section in Recipe.sections_of(type(recipe.train)):
        values[section] = train.pop(section)
    values |= {"train": train, "output_dir": output_dir}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"Dumper": Dumper, "sort_keys": False, "width": 120}
    text = yaml.dump(redact_values(values), allow_unicode=True, **options)
    if UNSAFE.search(text):  # YAML lets some pass that a terminal obeys
        text = yaml.dump(redact_values(values), allow_unicode=False, **options)
    Path(path).write_text(text, encoding="utf-8")


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
        placed.append(follow_section(override, raw, sections))
        assign(raw, placed[-1])
    try:
        return Recipe.parse(raw)
    except ConfigError as error:
        lines = [locate_fault(line, path, placed) for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from None


def _refuse_shared_folders(files: Sequence[Path], recipes: Sequence[Recipe]) -> None:
    owners: dict[Path, Path] = {}
    for file, recipe in zip(files, recipes, strict=True):
        folder = real_path(recipe.output_dir)
        if folder in owners:
            name = short_name(recipe.algorithm)
            raise ConfigError(
                f"{file}: output_dir: {recipe.output_dir!r} is the run folder of {owners[folder]} too; "
                f"give each its own, such as {name}.output_dir={recipe.output_dir}-{name}"
            )
        owners[folder] = file


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")
