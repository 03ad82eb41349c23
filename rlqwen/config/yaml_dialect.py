"""Read and write YAML as recipes use it.

It is YAML 1.1, which PyYAML reads, without what would surprise: duplicate keys, octal and sexagesimal numbers, numbers
that are not finite, keys that are no text, and tags are refused; `1e-4` is a number, and a date is text. A file of any
content ends in a message that names its line.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from rlqwen.config.usable_values import MAX_DEPTH, key_path, number_fault, text_fault
from rlqwen.errors import ConfigError, quoted

MAX_BYTES = 1 << 18
"""Largest file of a recipe, in bytes."""
MAX_VALUES = 100_000
"""Most values of a recipe, those that aliases repeat counted again."""
_TAG = "tag:yaml.org,2002:"
_KNOWN = {f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+[eE][-+]?[0-9]+$")
_FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
"""What PyYAML raises for a scalar that its explicit tag does not fit."""


class Loader(yaml.SafeLoader):
    """Load safe YAML without what the module refuses."""


class Dumper(yaml.SafeDumper):
    """Dump safe YAML, and quote strings that `Loader` would read as numbers."""


for _class in (Loader, Dumper):
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != f"{_TAG}timestamp"]
    for first, known in Loader.yaml_implicit_resolvers.items()
}


def _construct_mapping(loader: Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == f"{_TAG}merge":  # `<<: *anchor`, which flatten_mapping resolves
            continue
        key = loader.construct_object(key_node)
        if key in seen:
            raise _fault(key_node, f"key {quoted(key)} is given twice, first on line {seen[key]}")
        seen[key] = key_node.start_mark.line + 1
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def parse_yaml(text: str, key: str = "") -> Any:
    """Return the value of a YAML text; `key`: path of the key whose value it is, for messages.

    Raises MarkedYAMLError, whose problem is one line and whose mark is the place, for anything else than one document of
    the dialect.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check().count(node, (key,) if key else (), 0)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} levels deep") from None
    except yaml.reader.ReaderError as error:
        place = text.count("\n", 0, int(error.position)) + 1
        problem = f"the character {error.character:#06x} on line {place} is not allowed in YAML"
        raise yaml.MarkedYAMLError(problem=problem) from None


class _Check:
    """Check the nodes of a document before values are made of them."""

    def __init__(self) -> None:
        self._sizes: dict[int, int | None] = {}
        """id of a node -> its values; None while they are counted."""

    def count(self, node: yaml.Node, path: tuple[object, ...], depth: int) -> int:
        """Return the number of values in a node; raise MarkedYAMLError for one that the dialect refuses."""
        where = f"{key_path(path)}: " if path else ""
        if id(node) in self._sizes:
            size = self._sizes[id(node)]
            if size is None:
                raise _fault(node, f"{where}an alias of what it stands in")
            return size
        if node.tag not in _KNOWN:
            raise _fault(node, f"{where}{quoted(node.tag.removeprefix(_TAG))} is not a type that a recipe can hold")
        if depth > MAX_DEPTH:
            raise _fault(node, f"{key_path(path[:3])}: nested more than {MAX_DEPTH} levels deep")
        self._sizes[id(node)] = None
        size = 1
        if isinstance(node, yaml.ScalarNode):
            if fault := _scalar_fault(node):
                raise _fault(node, f"{where}{fault}")
        elif isinstance(node, yaml.MappingNode):
            for key_node, inner in node.value:
                if key_node.tag not in (f"{_TAG}str", f"{_TAG}int", f"{_TAG}merge"):
                    shown = quoted(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or a mapping"
                    raise _fault(key_node, f"{where}{shown} cannot be a key, unless quotes make it text")
                size += self.count(key_node, path, depth) + self.count(inner, (*path, key_node.value), depth + 1)
        else:
            size += sum(self.count(inner, (*path, place), depth + 1) for place, inner in enumerate(node.value))
        if size > MAX_VALUES:
            raise _fault(node, f"{where}more than {MAX_VALUES:,} values, those of aliases counted again")
        self._sizes[id(node)] = size
        return size


def _scalar_fault(node: yaml.ScalarNode) -> str | None:
    """Return why the value of a scalar is refused; None if it is not."""
    text = node.value
    given = f" (value given: {quoted(text)})"
    if node.tag == f"{_TAG}str":
        fault = text_fault(text)
        return fault and fault + given
    if node.tag == f"{_TAG}merge":
        return None
    try:
        value = yaml.constructor.SafeConstructor.yaml_constructors[node.tag](yaml.SafeLoader(""), node)
    except _FAULTS:
        return f"cannot be read as {node.tag.removeprefix(_TAG)}{given}"
    if node.tag not in (f"{_TAG}int", f"{_TAG}float"):
        return None
    if fault := number_fault(value):
        return fault + given
    if ":" in text:
        return f"YAML 1.1 reads {text} as {value}, in base 60: quote it, or write the number in base 10{given}"
    if _OCTAL.fullmatch(text):
        return f"YAML 1.1 reads {text} as {value}, in base 8: quote it, or write the number in base 10{given}"
    return None


def _fault(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a recipe's file; raise ConfigError that names the line if it is not a mapping in YAML."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes, and a recipe has at most {MAX_BYTES:,}: is this a data file?")
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise ConfigError(f"{where}: {error.problem or 'not valid YAML'}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8 (byte {error.start:,}): is this a recipe?") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        found = "an empty file" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path}: a recipe is a mapping that begins with `algorithm:`, but this is {found}")
    return values
