"""Set the environment that a private Ray's processes inherit."""

import getpass
import os
import tempfile


def temporary_files_in(folder: str) -> dict[str, str | None]:
    """Return variables by which Ray's processes write temporary files into `folder`, but keep compiled code for later."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{user}")
    return {"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": compiled}


def change_environment(changes: dict[str, str | None]) -> None:
    """Set environment variables of this process; None removes one."""
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
