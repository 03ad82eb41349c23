"""Find the config and the trainer of an algorithm by name.

An algorithm is a registered name, `package.module:Name` or `path/to/file.py:Name`. What is named is a config class, which
says in `trainer` which trainer takes it, or a trainer class with an attribute `config_class`. Packages register the config
class under the entry point group `rlqwen.trainers`, because a recipe is read before torch is imported.
"""

from typing import Any

from pydantic import BaseModel

from rlqwen.config.base import Section
from rlqwen.config.trainer import TrainerConfig
from rlqwen.errors import ConfigError
from rlqwen.plugins.kinds import TRAINERS


def config_class(algorithm: str) -> type[TrainerConfig]:
    """Return the config class of an algorithm; ConfigError if there is none."""
    found = TRAINERS.locate(algorithm)
    value: Any = found.value
    config: Any = value if _is_config(value) else getattr(value, "config_class", None)
    if not _is_config(config):
        raise ConfigError(
            f"algorithm {algorithm!r} ({found.origin}) is neither a subclass of rlqwen.config.TrainerConfig nor a trainer "
            f"with such an attribute config_class: it is {value!r}"
        )
    return config  # type: ignore[no-any-return]


def trainer_class(algorithm: str) -> Any:
    """Return the trainer class of an algorithm; imports torch."""
    value: Any = TRAINERS.load(algorithm)
    if not _is_config(value):
        return value
    if not value.trainer:
        raise ConfigError(f"algorithm {algorithm!r}: {value.__name__} names no trainer: set its attribute trainer")
    return TRAINERS.load(value.trainer)


def sections(config: type[BaseModel]) -> list[str]:
    """Return the fields of a trainer's config that stand at the top of a recipe."""
    return [name for name, field in config.model_fields.items() if _is_section(field.annotation)]


def _is_config(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, TrainerConfig)


def _is_section(annotation: Any) -> bool:
    kinds = getattr(annotation, "__args__", (annotation,))
    return any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)
