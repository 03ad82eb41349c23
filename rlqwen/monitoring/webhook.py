"""Call a webhook without delaying the run and without revealing its URL."""

import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from rlqwen.errors import ConfigError
from rlqwen.secrets import redact_values


class Webhook:
    """POST JSON to a URL, each call in its own thread.

    Args:
        url: http(s) URL, or `$NAME` of the environment variable that holds it.
        timeout_s: seconds for one call, and for all unfinished calls when the run ends.

    Raises:
        ConfigError: the environment variable is not set, or holds no http(s) URL.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        if url.startswith("$"):
            name = url.removeprefix("$")
            url = os.environ.get(name, "")
            if not url.startswith(("http://", "https://")):
                raise ConfigError(
                    f"watch.webhook: the environment variable {name} "
                    f"{'holds no http(s) URL' if url else 'is not set'}; set it, or remove watch.webhook"
                )
        self._url = url
        self._timeout_s = timeout_s
        self._threads: list[threading.Thread] = []
        self._problems: list[str] = []

    def post(self, payload: Mapping[str, Any]) -> None:
        """Send `payload` with secrets of the environment redacted, without waiting for an answer."""
        plain = redact_values({key: _plain(value) for key, value in payload.items()})
        body = json.dumps(plain, ensure_ascii=False).encode()
        thread = threading.Thread(target=self._send, args=(body,), daemon=True, name="rlqwen-webhook")
        self._threads = [*(other for other in self._threads if other.is_alive()), thread]
        thread.start()

    def problems(self) -> list[str]:
        """Return what went wrong since the last call of this method, without the URL."""
        found, self._problems = self._problems, []
        return found

    def close(self) -> None:
        """Wait for unfinished calls, at most `timeout_s` together."""
        deadline = time.monotonic() + self._timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []

    def _send(self, body: bytes) -> None:
        try:
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"}, method="POST")
            with urllib.request.urlopen(request, timeout=self._timeout_s):
                pass
        except urllib.error.HTTPError as error:
            self._problems.append(f"watch.webhook answered {error.code}")
        except Exception as error:  # noqa: BLE001  no error may stop the run
            # Some error messages quote the URL.
            self._problems.append(f"watch.webhook could not be reached: {type(error).__name__}")


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
