"""Find secrets in environment variables, to hide them from reward workers and from everything that is written."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH", re.IGNORECASE)
_HARMLESS_NAME = re.compile(r"TOKENIZER|KEYBOARD|SSH_AUTH_SOCK|XAUTHORITY", re.IGNORECASE)
_VALUE = re.compile(r"(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{12,}|\w+://[^/\s:@]*:[^/\s@]+@")
"""Values that are secrets whatever the variable's name: well-known tokens, and URLs with a password."""

_MIN_LENGTH = 8
"""Minimum length of a value that is redacted, because shorter values such as `true` occur in any text."""


def is_secret(name: str, value: str) -> bool:
    """Return whether an environment variable looks like a secret, by its name or its value."""
    looks = _NAME.search(name) is not None and _HARMLESS_NAME.search(name) is None
    return looks or _VALUE.search(value) is not None


def without_secrets(environment: Mapping[str, str], allowed: Collection[str] = ()) -> dict[str, str]:
    """Return `environment` without variables that look like secrets, except those named in `allowed`."""
    return {name: value for name, value in environment.items() if name in allowed or not is_secret(name, value)}


def redact(text: str) -> str:
    """Replace the values of this process's secrets in `text` by `[redacted: NAME]`."""
    redacted: str = _replace(text, _values())
    return redacted


def redact_values(content: Any) -> Any:
    """Redact every string, including keys, in nested lists, tuples and dicts."""
    secrets = _values()
    return _replace(content, secrets) if secrets else content


def _replace(content: Any, secrets: Sequence[tuple[str, str]]) -> Any:
    if isinstance(content, str):
        for name, value in secrets:
            content = content.replace(value, f"[redacted: {name}]")
        return content
    if isinstance(content, dict):
        return {_replace(key, secrets): _replace(value, secrets) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replace(value, secrets) for value in content]
    return content


def _values() -> list[tuple[str, str]]:
    """Return names and values of secrets, longest first, because one may contain another."""
    found = [
        (name, value) for name, value in os.environ.items() if len(value) >= _MIN_LENGTH and is_secret(name, value)
    ]
    return sorted(found, key=lambda one: -len(one[1]))
