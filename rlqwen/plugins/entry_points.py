"""Where rewards come from: entry points of installed packages, modules, and files. Looking imports nothing."""

import ast
import difflib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import operator
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlqwen.errors import RewardSpecError

ENTRY_POINT_GROUP = "rlqwen.rewards"


@dataclass(frozen=True, slots=True)
class RewardEntry:
    """A reward that an installed package registers; its module is not imported yet."""

    name: str
    value: str
    """`package.module:attribute`."""
    distribution: str
    version: str
    conflict: str | None = None
    """Why the name cannot be used: another package claims it too. None if it can."""

    @property
    def doc(self) -> str:
        """First line of its docstring, read from the source without importing it; empty if there is none."""
        return _read_doc(self.value)

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}"


def discover() -> dict[str, RewardEntry]:
    """Every registered reward by name, sorted; imports none. A name that two packages claim has its `conflict` set."""
    claims: dict[str, dict[tuple[str, str], RewardEntry]] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown package", "")
        entry = RewardEntry(point.name, f"{point.module}:{point.attr}", distribution, version)
        claims.setdefault(point.name, {})[distribution, entry.value] = entry
    return {name: _settle(name, list(claims[name].values())) for name in sorted(claims)}


def _settle(name: str, claimants: list[RewardEntry]) -> RewardEntry:
    first = claimants[0]
    if len(claimants) == 1:
        return first
    packages = " and ".join(f"{entry.origin} ({entry.value})" for entry in claimants)
    conflict = (
        f"reward {name!r} is registered by more than one package: {packages}; uninstall one, "
        f"or name the function itself, for example {first.value!r}"
    )
    return RewardEntry(name, first.value, first.distribution, first.version, conflict)


def load(spec: str) -> Any:
    """Import what `spec` names: a registered name, `package.module:function`, or `path/to/file.py:function`.

    Raises RewardSpecError if it is unknown, claimed by two packages, or fails to import.
    """
    return locate(spec)[0]


def locate(spec: str) -> tuple[Any, str, str]:
    """As `load`: the object, the name that its metrics get, and its origin (package and version, module, or file)."""
    home, _, attribute = spec.rpartition(":")
    if not home:
        entry = _look_up(spec)
        home, _, attribute = entry.value.rpartition(":")
        label = f"reward {spec!r} ({entry.value}, {entry.origin})"
        return _attribute(_import_module(home, label), attribute, label), spec, entry.origin
    label = f"reward {spec!r}"
    if home.endswith(".py"):
        return _attribute(_import_file(Path(home), label), attribute, label), attribute.rpartition(".")[2], home
    return _attribute(_import_module(home, label), attribute, label), attribute.rpartition(".")[2], home


def _look_up(name: str) -> RewardEntry:
    entries = discover()
    if name not in entries:
        hint = f"; did you mean {near!r}?" if (near := nearest(name, entries)) else "."
        if "." in name:
            hint = f"; name the function too: {name}:function."
        raise RewardSpecError(
            f"unknown reward {name!r}{hint} Registered: {', '.join(entries) or 'none'}. "
            f"Also accepted: package.module:function and path/to/file.py:function"
        )
    if conflict := entries[name].conflict:
        raise RewardSpecError(conflict)
    return entries[name]


def _import_module(name: str, label: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        hint = "; install the package, or give a file as path/to/file.py:function" if missing else ""
        raise RewardSpecError(f"{label} cannot be imported: {type(error).__name__}: {error}{hint}") from error


def _import_file(path: Path, label: str) -> Any:
    if not path.is_file():
        raise RewardSpecError(f"{label}: there is no file {str(path)!r} in {str(Path.cwd())!r}")
    path = path.resolve()
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardSpecError(f"{label} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _attribute(module: Any, attribute: str, label: str) -> Any:
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError:
        near = nearest(attribute, [name for name, value in vars(module).items() if callable(value)])
        hint = f"; did you mean {near!r}?" if near else ""
        raise RewardSpecError(f"{label}: module {module.__name__!r} has no {attribute!r}{hint}") from None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Which of `names` was probably meant by `name`; None if none is near."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def _read_doc(value: str) -> str:
    module, _, attribute = value.partition(":")
    path = _source_of(module)
    if path is None:
        return ""
    try:
        tree: Any = ast.parse(path.read_bytes())
    except SyntaxError:  # a stranger's package; loading it will say so
        return ""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = next((node for node in tree.body if isinstance(node, definitions) and node.name == attribute), tree)
    return (ast.get_docstring(found) or "").partition("\n")[0]


def _source_of(module: str) -> Path | None:
    """The source file of a module, found without importing it or its parents."""
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
