"""Run a Python script confined, as a program: `python -I confine.py SCRIPT ARGUMENTS...`.

It starts with each completion that is tested, so it imports little, and nothing of the packages around it.
"""

import os
import sys
import types

if __name__ == "__main__":
    # The modules of this folder under their own names, without rlqwen's other modules.
    for _name in ("rlqwen", "rlqwen.rewards", "rlqwen.rewards.sandbox"):
        sys.modules[_name] = types.ModuleType(_name)
        sys.modules[_name].__path__ = [os.path.dirname(os.path.abspath(__file__))]  # noqa: PTH100, PTH120

from rlqwen.rewards.sandbox import landlock, seccomp


def python_folders() -> list[str]:
    """Return the folders of the interpreter, its library and the installed packages."""
    prefixes = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    return [folder for folder in dict.fromkeys(prefixes) if folder not in ("/", os.path.expanduser("~"))]  # noqa: PTH111


def _run_confined(script: str) -> None:
    """Run a script, or a folder with `__main__.py`, in this process, confined. The process must be isolated already."""
    seccomp.forbid_new_privileges()
    landlock.restrict([*python_folders(), script])
    seccomp.install(seccomp.confining_filter(os.getpid()))
    for name in [name for name in sys.modules if name.partition(".")[0] == "rlqwen"]:
        del sys.modules[name]
    sys.path[0] = script if os.path.isdir(script) else os.path.dirname(script)  # noqa: PTH112, PTH120
    file = os.path.join(script, "__main__.py") if os.path.isdir(script) else script  # noqa: PTH112, PTH118
    with open(file, "rb") as opened:  # noqa: PTH123
        code = compile(opened.read(), file, "exec")
    module = types.ModuleType("__main__")
    module.__file__ = file
    sys.modules["__main__"] = module
    exec(code, vars(module))  # noqa: S102


if __name__ == "__main__":
    del sys.argv[0]
    _run_confined(sys.argv[0])
