"""Decide where the names that a test uses and does not define come from: Python, the prompt, or the completion's code."""

import ast
import builtins
import contextlib
import importlib
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

_ALIASES = {"np": "numpy", "pd": "pandas"}
_HELPERS = (
    *("math", "cmath", "statistics", "itertools", "functools", "operator", "collections", "copy", "fractions"),
    *("decimal", "heapq", "bisect", "string", "random", "re", "json"),
)
"""Modules whose public names a test may use without importing them, as code that it was written for did import them."""


def names_of_code(sources: Iterable[str], entry_point: str | None) -> set[str]:
    """Return the names in the sources of tests that mean the completion's code.

    Modules of Python and what they define mean Python's, not what the completion calls so: a class `math` would pass any
    test by `math.isclose`. A function that is tested may have such a name (`gcd`): it is the completion's if the tests use
    no other name of the completion's, or if it is the entry point.
    """
    loaded: set[str] = set()
    bound: set[str] = set()
    with_attributes: set[str] = set()
    alone: set[str] = set()
    for source in sources:
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            for node in ast.walk(ast.parse(source)):
                match node:
                    case ast.Attribute(value=ast.Name(id=name)):
                        with_attributes.add(name)
                    case ast.Call(func=ast.Name(id=name)):
                        alone.add(name)
                    case ast.Name(id=name, ctx=ast.Load()):
                        loaded.add(name)
                    case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                        bound.add(name)
                    case ast.alias(name=name, asname=alias):
                        bound.add(alias or name.partition(".")[0])
    free = {name for name in loaded | alone | with_attributes if name not in bound and not hasattr(builtins, name)}
    modules = {name for name in with_attributes - alone if _module_name(name) is not None}
    taken = free - modules
    if len(taken) < 2:
        return taken
    known = {name for name in taken if _helper(name) is not None} - {entry_point}
    return taken - known if taken - known else taken


class TestNames(dict[str, Any]):
    """Resolve names in a test: its own, the prompt's helpers, Python's built-ins, then those of names_of_code, then Python's.

    Args:
        name_of_code: fetches a name from the code's process; raises AttributeError if it has none.
        taken: what names_of_code returned.
        helpers: source of the prompt, as in HumanEval; what it defines besides the entry point is the test's own.
        entry_point: the function under test.
    """

    __test__ = False

    def __init__(
        self, name_of_code: Callable[[str], Any], taken: Collection[str], helpers: str, entry_point: str | None
    ) -> None:
        super().__init__(__name__="test", __builtins__=builtins)
        self._name_of_code, self._taken = name_of_code, taken
        if helpers:
            self._define(helpers, entry_point)

    def _define(self, helpers: str, entry_point: str | None) -> None:
        with contextlib.suppress(Exception):  # a prompt that is no Python has no helpers
            tree = ast.parse(helpers)
            tree.body = [node for node in tree.body if getattr(node, "name", None) != entry_point]
            exec(compile(tree, "<prompt>", "exec"), self, self)  # noqa: S102

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)  # Python then looks in the built-ins
        if name not in self._taken:
            module = _module_name(name)
            if module is not None:
                return importlib.import_module(module)
            helper = _helper(name)
            if helper is not None:
                return getattr(importlib.import_module(helper), name)
        try:
            return self._name_of_code(name)
        except AttributeError:
            raise KeyError(name) from None


def _module_name(name: str) -> str | None:
    return _ALIASES.get(name) or (name if name in sys.stdlib_module_names else None)


def _helper(name: str) -> str | None:
    """Return the first module of _HELPERS that defines a public name; None if none does."""
    if name.startswith("_"):
        return None
    return next((module for module in _HELPERS if hasattr(importlib.import_module(module), name)), None)
