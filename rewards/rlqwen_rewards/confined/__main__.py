"""Run one role of the program: `candidate` (a completion's code) or `judge` (the tests)."""

import resource
import sys
import types
from pathlib import Path


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


def _main() -> None:
    role, memory_bytes, cpu_seconds, *fds = sys.argv[1:]
    _limit(int(memory_bytes), int(cpu_seconds))
    # The modules of this folder under their own names, without the package around them.
    for name, path in (("rlqwen_rewards", []), ("rlqwen_rewards.confined", [str(Path(__file__).parent)])):
        package = types.ModuleType(name)
        package.__path__ = path
        sys.modules[name] = package
    if role == "candidate":
        from rlqwen_rewards.confined import candidate

        candidate.main(*map(int, fds))
    else:
        from rlqwen_rewards.confined import judge

        judge.main(*map(int, fds))


if __name__ == "__main__":
    _main()
