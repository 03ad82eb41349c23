"""Find the config class and the trainer class of an algorithm.

A recipe's `algorithm` is a name that a package registers in the entry point group `rlqwen.trainers`,
`package.module:Class` or `path/to/file.py:Class`. The class is one of two:

- the config of a trainer: a subclass of TrainerConfig whose `trainer` names the trainer class. Register this one, because
  a recipe is then read without importing torch.
- the trainer itself, whose `config_class` is its config class.

Example:
    # my_package/config.py, registered as `spo = "my_package.config:SPOConfig"`
    class SPOConfig(GRPOConfig):
        trainer: ClassVar[str] = "my_package.trainer:SPOTrainer"

    # my_trainer.py, for `algorithm: my_trainer.py:SPOTrainer`
    class SPOTrainer(GRPOTrainer):      # inherits config_class = GRPOConfig
        ...
"""

import sys
from typing import Any

from pydantic import BaseModel

from rlqwen.config.base import Section
from rlqwen.config.trainer import TrainerConfig
from rlqwen.errors import ConfigError
from rlqwen.plugins.kinds import TRAINERS
from rlqwen.plugins.modules import find_attribute


def config_class(algorithm: str) -> type[TrainerConfig]:
    """Return the config class of an algorithm.

    Raises ConfigError if the algorithm is unknown, is registered by two packages, fails to import, or has no config class.
    """
    found = TRAINERS.locate(algorithm)
    value: Any = found.value
    config: Any = value if _is_config(value) else getattr(value, "config_class", None)
    if not _is_config(config):
        raise ConfigError(
            f"algorithm {algorithm!r} ({found.origin}) is neither a subclass of rlqwen.config.TrainerConfig nor a trainer "
            f"whose attribute config_class is one: it is {value!r}"
        )
    return config  # type: ignore[no-any-return]


def trainer_class(algorithm: str) -> Any:
    """Return the trainer class of an algorithm, which imports torch; raise ConfigError if there is none."""
    value: Any = TRAINERS.load(algorithm)
    if not _is_config(value):
        return value
    if not value.trainer:
        raise ConfigError(f"algorithm {algorithm!r}: {value.__name__} names no trainer: set its attribute trainer")
    if ":" in value.trainer:
        return TRAINERS.load(value.trainer)
    owner = next(base for base in value.__mro__ if "trainer" in vars(base))
    return find_attribute(sys.modules[owner.__module__], value.trainer, f"algorithm {algorithm!r}", ConfigError)


def sections(config: type[BaseModel]) -> list[str]:
    """Return the fields of a trainer's config that stand at the top of a recipe."""
    return [name for name, field in config.model_fields.items() if _is_section(field.annotation)]


def short_name(algorithm: str) -> str:
    """Return the registered name, or the class's name: what an override on the command line begins with."""
    return algorithm.rpartition(":")[2].rpartition(".")[2]


def _is_config(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, TrainerConfig)


def _is_section(annotation: Any) -> bool:
    kinds = getattr(annotation, "__args__", (annotation,))
    return any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)
