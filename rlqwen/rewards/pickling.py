"""Pickle reward functions for worker processes, and find those that keep state between calls."""

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import cloudpickle

_WRAPPER_ATTRIBUTES = {"__wrapped__", "__name__", "__qualname__", "__doc__", "__module__", "__annotations__"}


def pickle_function(function: Callable[..., Any]) -> bytes:
    """Pickle `function` for a worker.

    Functions of `__main__`, of notebooks and of modules that a fresh interpreter could not import are pickled by value.
    Raises whatever the pickler raises if `function` cannot be pickled.
    """
    module = _unimportable_module(function)
    if module is None:
        return bytes(cloudpickle.dumps(function))
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(function))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def describe_state(function: Callable[..., Any]) -> str | None:
    """Say what keeps state between calls of `function`; None for a plain function, which keeps none."""
    if isinstance(function, functools.partial):
        return describe_state(function.func)
    if inspect.ismethod(function):
        owner = function.__self__
        return None if isinstance(owner, type) else f"it is a method of a {type(owner).__name__} object"
    if inspect.isroutine(function) or isinstance(function, type):
        return None
    parameters = getattr(type(function), "__dataclass_params__", None)
    if dataclasses.is_dataclass(function) and parameters is not None and parameters.frozen:
        return None
    attributes = {*getattr(function, "__dict__", {}), *getattr(type(function), "__slots__", ())}
    if attributes - _WRAPPER_ATTRIBUTES:
        return f"it is a {type(function).__name__} object with attributes"
    return None


def _unimportable_module(function: Callable[..., Any]) -> ModuleType | None:
    """Return the module of `function` if a worker could not import it by name."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__module__", None) or type(function).__module__
    module = sys.modules.get(name)
    if module is None or name == "__main__" or _can_import(name, getattr(module, "__file__", None)):
        return None
    return module


def _can_import(name: str, file: str | None) -> bool:
    """Return whether a fresh interpreter with this `sys.path` finds module `name` in `file`.

    importlib.util.find_spec does not answer that, because it reads sys.modules.
    """
    parent, _, _ = name.rpartition(".")
    path = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    if parent and (path is None or not _can_import(parent, getattr(sys.modules[parent], "__file__", None))):
        return False
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            return file is None or spec.origin is None or os.path.realpath(spec.origin) == os.path.realpath(file)
    return False
