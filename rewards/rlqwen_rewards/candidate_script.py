"""Run a completion's Python code in a process that does not hold the expected results.

A script: `candidate_script.py REQUESTS REPLIES MEMORY_BYTES CPU_SECONDS`; the first two are file descriptors. It writes
`["ready"]`, reads the code, and either runs it as a program, or loads it and answers requests, one JSON list per line:

    ["program", code]                     runs the code as `__main__` with the standard input and output
    ["load", code]                        -> ["value", null]
    ["get", name or handle, attribute]    -> ["value", encoded]
    ["set", handle, attribute, value]     -> ["value", null]
    ["call", handle, arguments, keywords] -> ["value", encoded]

or `["raised", class, message]`. This script does not defend itself against the code, which may write any reply. The code
gains nothing by that, because replies are plain data and the other process compares them with the expected results.
"""

import collections
import json
import os
import resource
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

_MAX_SMALL_INT = 1 << 62
_LISTS: tuple[Any, ...] = (
    list,
    collections.deque,
    range,
    Iterator,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


def encode(value: Any, opaque: Callable[[Any], Any]) -> Any:
    """Encode plain data as JSON that keeps the type; `opaque` encodes or refuses everything else.

    An instance of a subclass of a plain type becomes that plain type, which drops methods that the code overrides.
    """
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str.__str__(value)
    if isinstance(value, int):
        small = -_MAX_SMALL_INT < value < _MAX_SMALL_INT
        return int(value) if small else {"int": hex(value)}
    if isinstance(value, float | complex):
        return {"float": repr(float(value))} if isinstance(value, float) else {"complex": repr(complex(value))}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key, opaque), encode(one, opaque)] for key, one in dict.items(value)]}
    for name, kinds in (("list", _LISTS), ("tuple", tuple), ("set", (set, frozenset))):
        if isinstance(value, kinds):
            return {name: [encode(one, opaque) for one in value]}
    if hasattr(value, "tolist") and not isinstance(value, type):
        return encode(value.tolist(), opaque)
    return opaque(value)


def decode(content: Any, handle: Callable[[int], Any]) -> Any:
    """Decode what `encode` returned. `handle` returns the object of a handle. Raises ValueError for other content."""
    if content is None or isinstance(content, bool | int | str):
        return content
    if not isinstance(content, dict) or len(content) != 1:
        raise ValueError(f"not an encoded value: {content!r:.80}")
    ((kind, inner),) = content.items()
    if kind in ("list", "tuple", "set"):
        values = [decode(one, handle) for one in inner]
        return values if kind == "list" else tuple(values) if kind == "tuple" else set(values)
    if kind == "dict":
        return {decode(key, handle): decode(value, handle) for key, value in inner}
    readers: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "float": float,
        "complex": complex,
        "bytes": bytes.fromhex,
        "handle": handle,
    }
    if kind not in readers:
        raise ValueError(f"not an encoded value: {content!r:.80}")
    return readers[kind](inner)


class _Server:
    """Answer requests about the objects of one module."""

    def __init__(self) -> None:
        self.module = types.ModuleType("completion")
        self.objects: list[Any] = [self.module]
        """Object of each handle; handle 0 is the module."""

    def answer(self, kind: str, *parts: Any) -> Any:
        if kind == "load":
            sys.modules["completion"] = self.module
            exec(compile(parts[0], "<completion>", "exec"), vars(self.module))  # noqa: S102
            return None
        target = self.objects[parts[0]]
        if kind == "get":
            return self._encode(getattr(target, parts[1]))
        if kind == "set":
            setattr(target, parts[1], self._decode(parts[2]))
            return None
        arguments, keywords = self._decode(parts[1]), self._decode(parts[2])
        return self._encode(target(*arguments, **keywords))

    def _encode(self, value: Any) -> Any:
        return encode(value, self._keep)

    def _decode(self, content: Any) -> Any:
        return decode(content, self.objects.__getitem__)

    def _keep(self, value: Any) -> Any:
        self.objects.append(value)
        return {"handle": len(self.objects) - 1}


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
    }
    for limit, value in limits.items():
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))


def main() -> None:
    requests_fd, replies_fd, memory_bytes, cpu_seconds = map(int, sys.argv[1:])
    _limit(memory_bytes, cpu_seconds)
    requests, replies = os.fdopen(requests_fd, "rb"), os.fdopen(replies_fd, "wb", buffering=0)

    def reply(*content: Any) -> None:
        replies.write(json.dumps(content).encode() + b"\n")

    reply("ready")
    server = _Server()
    for line in requests:
        request = json.loads(line)
        if request[0] == "program":
            requests.close()
            replies.close()
            sys.argv[:] = ["completion.py"]
            # Run in a new namespace, without any name of this module.
            names = {"__name__": "__main__", "__builtins__": __builtins__}
            exec(compile(request[1], "<completion>", "exec"), names)  # noqa: S102
            return
        try:
            reply("value", server.answer(*request))
        except BaseException as error:  # noqa: BLE001  the code may raise anything, SystemExit included
            reply("raised", type(error).__name__, str(error)[:500])


if __name__ == "__main__":
    main()
