"""Import modules and files that users name, and read docstrings without importing."""

import ast
import difflib
import importlib
import importlib.machinery
import importlib.util
import operator
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlqwen.errors import InputError

_imported_files: dict[str, tuple[int, int]] = {}
"""Module name of an imported file -> its time of modification, in ns, and its size, in bytes."""


def import_module(name: str, label: str, error: type[InputError], *, kind: str = "function") -> Any:
    """Import a module by its dotted name; `label` begins the message of the `error` that is raised if it fails."""
    try:
        return importlib.import_module(name)
    except Exception as cause:
        missing = isinstance(cause, ModuleNotFoundError) and cause.name == name.partition(".")[0]
        hint = f"; install the package, or give a file as path/to/file.py:{kind}" if missing else ""
        raise error(f"{label} cannot be imported: {type(cause).__name__}: {cause}{hint}") from cause


def import_file(path: Path, label: str, error: type[InputError]) -> Any:
    """Import a file under a module name of its own; `label` begins the message of the `error` if it fails.

    A file that has not changed since its last import is not run again, so that its classes stay the same.
    """
    if not path.is_file():
        raise error(f"{label}: there is no file {str(path)!r} in {str(Path.cwd())!r}")
    path = Path(os.path.realpath(path))
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    stamp = (path.stat().st_mtime_ns, path.stat().st_size)
    if name in sys.modules and _imported_files.get(name) == stamp:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as cause:
        del sys.modules[name]
        raise error(f"{label} cannot be imported: {type(cause).__name__}: {cause}") from cause
    _imported_files[name] = stamp
    return module


def find_attribute(module: Any, attribute: str, label: str, error: type[InputError]) -> Any:
    """Return a (dotted) attribute of a module; raise `error` with the nearest name if there is none."""
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError:
        callables = [name for name, value in vars(module).items() if callable(value)]
        near = difflib.get_close_matches(attribute, callables, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise error(f"{label}: module {module.__name__!r} has no {attribute!r}{hint}") from None


def read_doc(value: str) -> str:
    """Return the first docstring line of `package.module:attribute`, without importing it; empty if there is none."""
    module, _, attribute = value.partition(":")
    path = _source_of(module)
    if path is None:
        return ""
    try:
        tree: Any = ast.parse(path.read_bytes())
    except SyntaxError:  # a stranger's package; loading it will raise the error
        return ""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = next((node for node in tree.body if isinstance(node, definitions) and node.name == attribute), tree)
    return (ast.get_docstring(found) or "").partition("\n")[0]


def _source_of(module: str) -> Path | None:
    """Return the source file of a module, found without importing it or its parents."""
    path: Sequence[str] | None = None
    spec = None
    for depth in range(1, module.count(".") + 2):
        name = ".".join(module.split(".")[:depth])
        finders = sys.meta_path if path is None else [importlib.machinery.PathFinder]
        spec = next((found for finder in finders if (found := finder.find_spec(name, path))), None)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    origin = Path(spec.origin) if spec and spec.origin else None
    return origin if origin and origin.suffix == ".py" and origin.is_file() else None
