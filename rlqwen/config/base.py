"""Define the base of every config model, which refuses unknown keys and explains errors in one line each."""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict

from rlqwen.config.usable_values import expand_path, refuse_unusable
from rlqwen.errors import QUOTED, ConfigError, quoted

NO_EFFECT: JsonDict = {"affects_result": False}
"""Pass as `json_schema_extra` of a field that does not change the trained weights unless something fails."""


PathText = Annotated[str, AfterValidator(expand_path)]
"""A path, or a name in the place of one; `~` and `$NAME` at any place are expanded."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""The seed of a random generator; numpy's has 32 bits."""


class Config(BaseModel):
    """Refuse unknown keys, and suggest the key that was probably meant."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    refused: ClassVar[dict[str, str]] = {}
    """Keys of other libraries that rlqwen does not have: key -> what to use instead."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            refuse_unusable(values)
            for key, value in values.items():
                if key not in cls.model_fields:
                    raise ValueError(f"{cls._unknown(str(key)[:QUOTED])} (value given: {quoted(value)})")
        return values

    @classmethod
    def _unknown(cls, key: str) -> str:
        if key in cls.refused:
            return f"{key!r} has no meaning in rlqwen: {cls.refused[key]}"
        near = difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.6) or [
            field for field in cls.model_fields if key == "".join(word[:1] for word in field.split("_"))
        ]
        if near:
            return f"unknown key {key!r}; did you mean {near[0]!r}?"
        return f"unknown key {key!r}; known keys: {', '.join(sorted(cls.model_fields))}"

    def result_settings(self) -> dict[str, Any]:
        """Return the JSON values of the fields that affect a run's result: all but those marked NO_EFFECT."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.json_schema_extra == NO_EFFECT:
                del values[name]
            elif isinstance(value, Config):
                values[name] = value.result_settings()
        return values

    @classmethod
    def parse(cls, values: Any, where: str = "") -> Self:
        """Validate `values`; raise ConfigError with one line per fault, which begins with `where` and the key's
        path."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(error, where) from None


class ArgumentsConfig(Config):
    """A config that users construct in Python; its constructor raises ConfigError."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error) from None


class Section(ArgumentsConfig):
    """A part of a trainer's config that stands at the top of a recipe, next to `train`."""


def section_values(section: Any) -> dict[str, Any] | None:
    """Return what a section sets, given as a config, a mapping or nothing; None for anything else, which validation
    refuses."""
    if isinstance(section, Config):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, Mapping) else {} if section is None else None


def explain(error: ValidationError, where: str = "") -> ConfigError:
    """Turn pydantic's report into one line per fault: `where: path.to.key: what is wrong (value given: ...)`."""
    lines = []
    for fault in error.errors(include_url=False):
        path = ".".join(str(part)[:QUOTED] for part in fault["loc"] if not str(part).startswith("<"))
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            lines += [_prefix(path, line) for line in str(cause).splitlines()]
            continue
        if isinstance(cause, ValueError):
            message = str(cause)
        else:
            message = f"{fault['msg'][0].lower()}{fault['msg'][1:]} (value given: {quoted(fault['input'])})"
        lines.append(f"{path}: {message}" if path else message)
    prefix = f"{where}: " if where else ""
    return ConfigError("\n".join(prefix + line for line in lines))


def _prefix(path: str, fault: str) -> str:
    """Join the path of a config to a fault inside it: `rollout` and `num_workers: ...` to `rollout.num_workers: ...`."""
    if not path:
        return fault
    return f"{path}.{fault}" if re.match(r"[\w.]+: ", fault) else f"{path}: {fault}"
