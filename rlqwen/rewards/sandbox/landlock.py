"""Restrict a process and its children to reading a list of files, by Landlock, without root.

Landlock (landlock(7), Linux 5.13) also stops a process from tracing any process that is not under the same or a
stricter rule, and from reading its memory, environment and file descriptors. Since Linux 6.12 it blocks signals to such
processes, too.
"""

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE = 1 << 14
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_MOST_RIGHTS = 16
"""Number of access rights since version 5."""
_SCOPE_ABSTRACT_UNIX_AND_SIGNALS = 0b11

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random")
_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d"),
    *("/etc/localtime", "/etc/alternatives", "/proc/cpuinfo", "/proc/meminfo"),
    *("/sys/devices/system/cpu", "/sys/devices/system/node"),
)


def version() -> int:
    """Return the version of the kernel's Landlock; raise OSError if it has none or it is switched off."""
    libc = ctypes.CDLL(None, use_errno=True)
    return _checked(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION)))


def restrict(readable: Iterable[str], listed: Iterable[str] = ()) -> None:
    """Restrict this process to reading files in and below `readable`, and the system's programs and libraries.

    Below `listed` it may list file names. It can write only to `/dev/null` and to files that are already open. Raises
    OSError if the kernel does not support this.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    abi = version()
    rights = (1 << _NUM_RIGHTS.get(abi, _MOST_RIGHTS)) - 1
    # Access to files, to the network (seccomp handles that), scope. Kernels before version 6 take the short struct.
    handled = struct.pack("QQQ", rights, 0, _SCOPE_ABSTRACT_UNIX_AND_SIGNALS) if abi >= 6 else struct.pack("Q", rights)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), ctypes.c_uint32(0)))
    try:
        for path in (*_SYSTEM, *readable):
            _allow(libc, ruleset, path, _READ_FILE | _READ_DIR | _EXECUTE)
        for path in listed:
            _allow(libc, ruleset, path, _READ_DIR)
        for path in _DEVICES:
            _allow(libc, ruleset, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE) & rights)
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)))
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # a missing file needs no rule
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= ~_READ_DIR
        rule = struct.pack("=Qi", rights, fd)
        _checked(libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, ctypes.c_uint32(0)))
    finally:
        os.close(fd)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        reason = "is switched off" if code == errno.EOPNOTSUPP else os.strerror(code)
        raise OSError(f"Landlock: {reason}")
    return result
