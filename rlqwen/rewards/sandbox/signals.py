"""Let an isolated worker signal only its own processes, on kernels whose Landlock does not see to it (before 6.12).

A filter of system calls sees the number of the process to signal, not whose it is; and every thread of a process has a
number of its own that reaches the whole process, so that no list of numbers protects one. Therefore the kernel holds each
such call (seccomp_unotify(2), Linux 5.5) until the watchdog, which is outside the sandbox, has looked up whether the target
is in the worker's process group.
"""

import contextlib
import errno
import fcntl
import os
import struct

from rlqwen.rewards.sandbox import landlock

_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION_BYTES = 80
_FIRST_ARGUMENT = 32
_CONTINUE = 1
_FIRST_SCOPED = 6
"""The version of Landlock that confines signals."""


def must_be_held() -> bool:
    """Return whether this kernel needs a watchdog that answers `answer`."""
    try:
        return landlock.version() < _FIRST_SCOPED
    except OSError:
        return False  # then nothing can be isolated, which the worker reports


def answer(listener: int) -> None:
    """Answer a call that the kernel holds: let it go on if it signals a process of this process group but this one."""
    held = bytearray(_NOTIFICATION_BYTES)
    # The process that made the call may have ended meanwhile.
    with contextlib.suppress(FileNotFoundError):
        fcntl.ioctl(listener, _RECEIVE, held)
        (number,) = struct.unpack_from("=Q", held)
        (target,) = struct.unpack_from("=i", held, _FIRST_ARGUMENT)
        error, flags = (0, _CONTINUE) if _is_own(target) else (-errno.EPERM, 0)
        fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", number, 0, error, flags))


def _is_own(target: int) -> bool:
    if target <= 0 or target == os.getpid():
        return False
    try:
        return os.getpgid(target) == os.getpgrp()
    except OSError:
        return False
