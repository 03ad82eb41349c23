"""Build and install seccomp filters, which forbid system calls to a process and its children, without root.

A filter is a program for the kernel's classic BPF machine (seccomp(2)). Filters add up, are inherited, and cannot be
removed. Supports Linux on x86-64 and aarch64.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from rlqwen.rewards.sandbox.syscalls import ARCHITECTURES, CALLS, DENIED, NEWEST

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _AND, _JUMP_EQ, _JUMP_GT, _JUMP_SET, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERRNO, _USER_NOTIF = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
_SECCOMP_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_AF_UNIX, _SOCK_STREAM, _SOCK_KIND = 1, 1, 0xF
_NEW_NAMESPACES = 0x7E020080
_CLONE_VFORK, _CLONE_PARENT, _CLONE_THREAD = 0x4000, 0x8000, 0x10000
_O_ACCMODE, _O_TRUNC, _O_ASYNC = 0o3, 0o1000, 0x2000
_MSG_OOB = 1
_F_SETFL = 4
_FILE_COMMANDS = (0, 1, 2, 3, _F_SETFL, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034)
"""What fcntl(2) may do: duplicate, read and set flags, lock, and read a pipe's size and a file's seals. All else is
refused, above all what has the kernel send a signal to any process (F_SETOWN, F_SETOWN_EX, F_SETSIG, F_NOTIFY), and
leases, which stop other processes that open the file."""
_DEVICE_COMMANDS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""What ioctl(2) may do: ask whether a file is a terminal (TCGETS, TCGETS2) and how large (TIOCGWINSZ), FIONREAD, FIONBIO,
FIONCLEX, FIOCLEX. All else is refused, above all what signals other processes or types for them (FIOSETOWN, SIOCSPGRP,
FIOASYNC, TIOCSTI, TIOCLINUX, TIOCSPGRP, TIOCSCTTY, TIOCSIG)."""
SIGNAL_CALLS = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
"""Calls whose first argument is the process to signal; tkill is refused."""

Instruction = tuple[int, int, int, int]
_REFUSED: Instruction = (_RETURN, 0, 0, _ERRNO | errno.EPERM)


def isolating_filter(protected: Iterable[int]) -> bytes:
    """Build the filter of an isolated process.

    It refuses network, forks (threads and programs are allowed), signals to the processes `protected` and to process
    groups, and all other calls listed in `DENIED`.
    """
    # ENOSYS makes callers fall back to the older clone and openat.
    rules = [*_refuse("clone3", errno.ENOSYS), *_refuse("openat2", errno.ENOSYS)]
    for name in DENIED:
        rules += _refuse(name)
    rules += _where("socketpair", 0, [(_JUMP_EQ, _AF_UNIX, False)])
    rules += _where("socketpair", 1, [(_JUMP_EQ, _SOCK_STREAM, False)], mask=_SOCK_KIND)
    # Out-of-band data have had faults in the kernel, and nothing here uses them.
    rules += _where("sendto", 3, [(_JUMP_SET, _MSG_OOB, True)])
    # A sibling would be a child of the watchdog.
    rules += _where("clone", 0, [(_JUMP_SET, _NEW_NAMESPACES | _CLONE_PARENT, True)])
    # The watchdog can count threads, and programs started by subprocess, which waits until they run. It cannot keep up
    # with a process that forks at full speed, and RLIMIT_NPROC does not apply to root.
    rules += _refuse("fork")
    rules += _where("clone", 0, [(_JUMP_SET, _CLONE_VFORK | _CLONE_THREAD, False)])
    rules += _where("prlimit64", 0, [(_JUMP_EQ, 0, False)])
    rules += _only("ioctl", 1, _DEVICE_COMMANDS)
    rules += _only("fcntl", 1, _FILE_COMMANDS)
    rules += _where("fcntl", 2, [(_JUMP_SET, _O_ASYNC, True)], when=(1, _F_SETFL))
    # Landlock before version 3 allows a file to be truncated by opening it for reading.
    for name, argument in (("open", 1), ("openat", 2)):
        rules += _where(name, argument, [(_JUMP_EQ, _O_TRUNC, True)], mask=_O_ACCMODE | _O_TRUNC)
    targets = [(_JUMP_EQ, 0, True), (_JUMP_GT, 0x7FFFFFFF, True), *((_JUMP_EQ, pid, True) for pid in protected)]
    for name in SIGNAL_CALLS:
        rules += _where(name, 0, targets)
    return _program(rules)


def confining_filter(pid: int) -> bytes:
    """Build the filter of a confined process: no new process, thread or program, and signals only to process `pid`."""
    rules = []
    for name in ("clone", "fork", "vfork"):
        rules += _refuse(name, errno.EAGAIN)
    for name in ("execve", "execveat", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
        rules += _refuse(name)
    for name in ("kill", "tgkill"):
        rules += _where(name, 0, [(_JUMP_EQ, pid, False)])
    return _program(rules)


def hold_signals() -> int:
    """Make the kernel hold every call that sends a signal until the reader of the returned file descriptor answers.

    Other filters may still refuse such a call at once. Raises OSError if a filter outside holds calls already.
    """
    rules = []
    for name in SIGNAL_CALLS:
        rules += [(_JUMP_EQ, 0, 1, CALLS[name][_machine()] or 0), (_RETURN, 0, 0, _USER_NOTIF)]
    header, _ = _header(_program(rules))
    libc = ctypes.CDLL(None, use_errno=True)
    number = CALLS["seccomp"][_machine()]
    listener = libc.syscall(number, _SECCOMP_SET_MODE_FILTER, ctypes.c_ulong(_NEW_LISTENER), ctypes.byref(header))
    if listener < 0:
        raise OSError(f"seccomp cannot hold signals: {os.strerror(ctypes.get_errno())}")
    os.set_inheritable(listener, False)
    return int(listener)


def forbid_new_privileges() -> None:
    """Deny programs that this process starts any new privileges, which the kernel requires before a filter."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, None)


def install(program: bytes) -> None:
    """Install a filter in this process; raise OSError if the kernel or the machine does not support it."""
    header, _ = _header(program)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(header))


def _header(program: bytes) -> tuple[Any, Any]:
    """Return the struct that names a filter to the kernel, and the filter's memory, to be kept as long."""
    code = ctypes.create_string_buffer(program, len(program))
    packed = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    return ctypes.create_string_buffer(packed, len(packed)), code


def _prctl(option: int, value: int, pointer: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise OSError(f"seccomp: {os.strerror(ctypes.get_errno())}")


def _machine() -> int:
    """Return the column of this machine in the tables; raise OSError if there is none."""
    if os.uname().machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(f"seccomp: no table of system calls for {os.uname().machine}")
    return list(ARCHITECTURES).index(os.uname().machine)


def _program(rules: list[Instruction]) -> bytes:
    """Assemble a filter.

    Calls by another machine's table kill the process; calls newer than NEWEST fail with ENOSYS.
    """
    start = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQ, 1, 0, ARCHITECTURES[os.uname().machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GT, 0, 1, NEWEST),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    return b"".join(struct.pack("HBBI", *one) for one in [*start, *rules, (_RETURN, 0, 0, _ALLOW)])


def _refuse(name: str, code: int = errno.EPERM) -> list[Instruction]:
    number = CALLS[name][_machine()]
    return [] if number is None else [(_JUMP_EQ, 0, 1, number), (_RETURN, 0, 0, _ERRNO | code)]


def _where(
    name: str,
    argument: int,
    tests: list[tuple[int, int, bool]],
    mask: int | None = None,
    when: tuple[int, int] | None = None,
) -> list[Instruction]:
    """Refuse a call depending on the low 32 bits of an argument, masked.

    `tests`: (jump, value, refuse_if); the call is refused if the result of a test equals `refuse_if`. `when`: another
    argument, and the value that it must have for the tests to be made.
    """
    body: list[Instruction] = [_load(argument)]
    if mask is not None:
        body.append((_AND, 0, 0, mask))
    for jump, value, refuse_if in tests:
        body += [(jump, 0, 1, value) if refuse_if else (jump, 1, 0, value), _REFUSED]
    if when is not None:
        body = [_load(when[0]), (_JUMP_EQ, 0, len(body), when[1]), *body]
    return _for_call(name, body)


def _only(name: str, argument: int, allowed: Sequence[int]) -> list[Instruction]:
    """Refuse a call unless the low 32 bits of an argument are one of the values `allowed`."""
    tests = [(_JUMP_EQ, len(allowed) - index, 0, value) for index, value in enumerate(allowed)]
    return _for_call(name, [_load(argument), *tests, _REFUSED])


def _load(argument: int) -> Instruction:
    return _LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument


def _for_call(name: str, body: list[Instruction]) -> list[Instruction]:
    """Run `body`, which falls through to allow, for the call `name` only."""
    number = CALLS[name][_machine()]
    if number is None:
        return []
    return [(_JUMP_EQ, 0, len(body) + 1, number), *body, (_LOAD, 0, 0, _NUMBER)]
