"""Narrow the type of a value that a test knows more about than its annotation says, and fail where it is wrong."""

from typing import TypeVar

from rlqwen.config import SourceConfig

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return a value that is not None."""
    assert value is not None
    return value


def instance_of(kind: type[T], value: object) -> T:
    """Return a value that is an instance of `kind`."""
    assert isinstance(value, kind), type(value)
    return value


def only_source(sources: object) -> SourceConfig:
    """Return the source of data that is not one of a list."""
    return instance_of(SourceConfig, sources)
