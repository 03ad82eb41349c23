"""Read what is to be planned: a recipe, or a model to be fine-tuned with usual settings."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlqwen.config import ModelConfig, Recipe
from rlqwen.config.overrides import Override, assign, follow_section, parse_override
from rlqwen.config.recipe_yaml import is_recipe, load_recipe
from rlqwen.data import load_rows
from rlqwen.errors import ConfigError, ModelError
from rlqwen.planning.published_models import nearest_published, published_config
from rlqwen.preflight.model_check import ConfigFacts, check_model_path, read_config
from rlqwen.preflight.model_size import ModelSize

_DATA = {"path": "builtin:questions"}
_BATCH = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
_USUAL: dict[str, dict[str, Any]] = {
    "sft": {
        "data": {"train": _DATA | {"columns": {"instruction": "question", "output": "answer"}}},
        "train": _BATCH | {"max_length": 4096, "packing": True},
    },
    "grpo": {
        "data": {"train": _DATA | {"columns": {"prompt": "question", "solution": "answer"}}},
        "rewards": ["accuracy"],
        "rollout": {"engine": "vllm"},
        "train": {
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_generations": 8,
            "max_prompt_length": 512, "max_completion_length": 4096, "max_tokens_per_micro_batch": 8192,
        },
    },
}  # fmt: skip
"""Algorithm -> what is planned for a model that is given without a recipe."""


def is_model(target: str) -> bool:
    """Return whether a target is a model alone, and no recipe."""
    return not is_recipe(target) and not Path(target).is_file()


def read_target(target: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of that file or name, else one that trains the model of that folder or hub id.

    `algorithm=grpo` among the overrides plans GRPO of a model; the default is full fine-tuning by SFT.
    """
    if not is_model(target):
        return load_recipe(target, overrides)
    parsed = [parse_override(text) for text in overrides]
    algorithm = str(next((each.value for each in parsed if each.path == ("algorithm",)), "sft"))
    if algorithm not in _USUAL:
        raise ConfigError(f"algorithm={algorithm!r}: a model alone is planned for {' or '.join(_USUAL)}; give a recipe")
    values = {"algorithm": algorithm, "model": {"path": target}, "output_dir": "runs/plan"} | _copy(_USUAL[algorithm])
    values["parallel"] = {} if any(each.path[0] == "parallel" for each in parsed) else {"engine": "fsdp2"}
    for override in parsed:
        assign(values, _placed(override, values))
    return Recipe.parse(values)


def measure(recipe: Recipe) -> ModelSize:
    """Measure the recipe's model from its config: a folder's, one that comes with rlqwen, or the hub's."""
    with tempfile.TemporaryDirectory() as scratch:
        facts = _facts(recipe.model, Path(scratch))
        return ModelSize.measure(recipe, facts, read=_facts)


def count_rows(recipe: Recipe) -> int | None:
    """Return the number of training rows; None where that would need the network, or a stream."""
    source = recipe.data.train
    sources = source if isinstance(source, list) else [source]
    if recipe.data.is_streamed or any(each is None or each.sampled for each in sources):
        return None
    paths = [str(getattr(each, "path", None) or "") for each in sources]
    if not all(not path or path.startswith("builtin:") or Path(path).exists() for path in paths):
        return None
    return len(load_rows(source, seed=recipe.data.mixing_seed, cache_dir=recipe.data.cache_dir))


def _facts(model: ModelConfig, scratch: Path) -> ConfigFacts:
    config = None if Path(model.path).expanduser().is_dir() else published_config(model.path)
    if config is not None:
        context = int(config.get_text_config().max_position_embeddings)
        return ConfigFacts(model.path, {}, config, context, "bfloat16", 0)
    if not (Path(model.path).expanduser() / "config.json").is_file():  # a plan needs neither weights nor tokenizer
        check_model_path(model.path)
    facts = read_config(model, scratch)
    if facts is None:
        near = nearest_published(model.path)
        hint = f"; did you mean Qwen/{near}?" if near else ""
        raise ModelError(
            f"model {model.path[:200]!r}: rlqwen has no config of that name, it is no folder here, and the hub cannot be "
            f"reached{hint}"
        )
    return facts


def _placed(override: Override, values: dict[str, Any]) -> Override:
    return follow_section(override, values, ("rollout", "scoring", "parallel"))


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in values.items()}
