"""Find objects that packages register by entry point, and objects that a module or a file holds.

Rewards, losses, advantage estimators, trainers and rollout engines are found this way, rlqwen's own among them.

Example:
    REWARDS = Registry("rlqwen.rewards", "reward", RewardSpecError)
    REWARDS.discover()["accuracy"].origin       # "rlqwen 0.2.0"; imports nothing
    REWARDS.load("my_rewards.py:digits")        # also "package.module:digits", and registered names
"""

import difflib
import functools
import importlib.metadata
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlqwen.errors import InputError
from rlqwen.plugins.modules import find_attribute, import_file, import_module, read_doc


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """An object that an installed package registers; its module is not imported yet."""

    name: str
    value: str
    """`package.module:attribute`."""
    distribution: str
    version: str
    conflict: str | None = None
    """Why the name cannot be used: another package registers it too. None if it can."""

    @property
    def doc(self) -> str:
        """First line of its docstring, read from the source without importing it; empty if there is none."""
        return read_doc(self.value)

    @property
    def origin(self) -> str:
        """Return the package and its version."""
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, slots=True)
class Located:
    """An object that was found and imported."""

    value: Any
    name: str
    """The registered name, or the last part of the attribute."""
    origin: str
    """Package and version, module, or file."""


class Registry:
    """The objects of one kind, by name, `package.module:attribute` or `path/to/file.py:attribute`."""

    def __init__(self, group: str, noun: str, error: type[InputError], *, kind: str = "function") -> None:
        """Look in the entry point group `group`.

        Messages call an object `noun`, say that a spec names a `kind` (such as `Class`), and are raised as `error`.
        """
        self.group = group
        self.noun = noun
        self.error = error
        self.kind = kind

    def discover(self) -> dict[str, PluginEntry]:
        """Return every registered entry by name, sorted; a name that two packages register has its `conflict` set."""
        return dict(_discover(self, _search_path()))

    def load(self, spec: str) -> Any:
        """Import and return what `spec` names.

        Raises this registry's error if it is unknown, registered by two packages, or fails to import.
        """
        return self.locate(spec).value

    def locate(self, spec: str) -> Located:
        """Import what `spec` names, as `load` does, and return it with its name and origin."""
        home, _, attribute = spec.rpartition(":")
        if not home:
            entry = self.look_up(spec)
            home, _, attribute = entry.value.rpartition(":")
            label = f"{self.noun} {spec!r} ({entry.value}, {entry.origin})"
            return Located(self._attribute_of_module(home, attribute, label), spec, entry.origin)
        label, name = f"{self.noun} {spec!r}", attribute.rpartition(".")[2]
        if home.endswith(".py"):
            module = import_file(Path(home), label, self.error)
            return Located(find_attribute(module, attribute, label, self.error), name, home)
        return Located(self._attribute_of_module(home, attribute, label), name, home)

    def look_up(self, name: str) -> PluginEntry:
        """Return the entry registered under `name`, without importing it; raise this registry's error if unusable."""
        entries = self.discover()
        if name not in entries:
            hint = f"; did you mean {near!r}?" if (near := nearest(name, entries)) else "."
            if "." in name:
                hint = f"; name the {self.kind} too: {name}:{self.kind}."
            raise self.error(
                f"unknown {self.noun} {name!r}{hint} Registered: {', '.join(entries) or 'none'}. Also accepted: "
                f"package.module:{self.kind} and path/to/file.py:{self.kind}"
            )
        if conflict := entries[name].conflict:
            raise self.error(conflict)
        return entries[name]

    def check_name(self, spec: str, key: str, others: Collection[str] = ()) -> None:
        """Raise ValueError, for a config's validator, if `spec` is a name that no package registers.

        Imports nothing; a module or a file is looked up when it is used. `key`: what the config calls it; `others`: names
        that are accepted besides.
        """
        if ":" in spec:
            return
        entries = self.discover()
        if spec not in entries:
            known = [*others, *(name for name in entries if name not in others)]
            hint = f"did you mean {near!r}? " if (near := nearest(spec, known)) else ""
            raise ValueError(
                f"{key}: unknown {self.noun} {spec!r}; {hint}known: {', '.join(known)}, or package.module:{self.kind} or "
                f"path/to/file.py:{self.kind}"
            )
        if conflict := entries[spec].conflict:
            raise ValueError(f"{key}: {conflict}")

    def _attribute_of_module(self, home: str, attribute: str, label: str) -> Any:
        module = import_module(home, label, self.error, kind=self.kind)
        return find_attribute(module, attribute, label, self.error)

    def resolve_claims(self, claimants: list[PluginEntry]) -> PluginEntry:
        """Return the entry of a name, with its `conflict` set if several packages claim it."""
        first = claimants[0]
        if len(claimants) == 1:
            return first
        packages = " and ".join(f"{entry.origin} ({entry.value})" for entry in claimants)
        conflict = (
            f"{self.noun} {first.name!r} is registered by more than one package: {packages}; uninstall one, "
            f"or name the {self.kind} itself, for example {first.value!r}"
        )
        return replace(first, conflict=conflict)


@functools.lru_cache(maxsize=64)
def _discover(registry: Registry, search_path: tuple[tuple[str, int], ...]) -> dict[str, PluginEntry]:
    """Read the entry points of a registry; again only if `search_path` has changed, because that takes 10 ms."""
    claims: dict[str, dict[tuple[str, str], PluginEntry]] = {}
    for point in importlib.metadata.entry_points(group=registry.group):
        distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown package", "")
        entry = PluginEntry(point.name, f"{point.module}:{point.attr}", distribution, version)
        claims.setdefault(point.name, {})[distribution, entry.value] = entry
    return {name: registry.resolve_claims(list(claims[name].values())) for name in sorted(claims)}


def _search_path() -> tuple[tuple[str, int], ...]:
    """Return the folders that packages are found in, and when each last changed, as it does when a package is installed."""
    return tuple((path, _changed_ns(path)) for path in sys.path)


def _changed_ns(path: str) -> int:
    try:
        return Path(path or ".").stat().st_mtime_ns
    except OSError:  # not there, or not ours to look at
        return 0


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return which of `names` was probably meant by `name`; None if none is near."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)
