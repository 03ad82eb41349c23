"""Run a completion's Python code, in a process that holds neither the tests nor the expected results.

It runs the code as a program, or loads it and answers requests, one JSON list per line:

    ["program", code]                     runs the code as `__main__` with the standard input and output
    ["load", code]                        -> ["value", null]
    ["get", name or handle, attribute]    -> ["value", encoded]
    ["set", handle, attribute, value]     -> ["value", null]
    ["call", handle, arguments, keywords] -> ["value", encoded]

or `["raised", class, message]`. It does not defend itself against the code, which may write any reply. The code gains
nothing by that, because replies are plain data and another process compares them with the expected results.
"""

import json
import os
import sys
import types
from typing import Any

from rlqwen_rewards.confined.values import decode, encode

READY = b"ready\n"
"""Written once a process is confined and can begin."""


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


def main(requests_fd: int, replies_fd: int) -> None:
    """Answer requests until there are no more."""
    requests, replies = os.fdopen(requests_fd, "rb"), os.fdopen(replies_fd, "wb", buffering=0)

    def reply(*content: Any) -> None:
        replies.write(json.dumps(content).encode() + b"\n")

    replies.write(READY)
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
