"""Keep a vLLM engine's requests while its weights are replaced.

Running requests keep the keys and values that older weights computed, as with vLLM's `pause_generation(mode="keep",
clear_cache=False)`. Requests that begin later share no prefix with them, because their blocks are cached under another
salt. vLLM labels each token with the version of the weights that sampled it.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

from vllm import LLMEngine, SamplingParams

from rlqwen.rollout.worker_protocol import WeightVersions

SPARE_PLACES = 1
"""Requests that vLLM must have room for besides those that it is given: the canary, which must not wait until a long
completion has ended."""
_FIRST = -1
"""Priority of the canary; that of others is 0. It needs vLLM's scheduling policy `priority`."""


class KeptRequests:
    """Give requests to an LLMEngine as places come free, and keep them over a change of weights."""

    def __init__(self, llm: LLMEngine, *, num_places: int, version: int) -> None:
        """Serve requests with an engine that holds `version` and decodes `num_places` completions at a time."""
        self._llm: Any = llm
        self._num_places = num_places
        self._waiting: deque[tuple[str, list[int], SamplingParams]] = deque()
        """Requests that vLLM has not been given, so that they begin with the weights of that time."""
        self._running: set[str] = set()
        self._ended: list[Any] = []
        """Outputs that came between two calls of `step`."""
        self._versions: dict[str, WeightVersions] = {}
        self._salt = ""
        self._label(version)

    def add(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request."""
        self._waiting.append((request_id, token_ids, params))

    def add_first(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        """Give vLLM a request of the caller's own, ahead of all others; `step` and `note` pass over it."""
        self._give(request_id, token_ids, params, priority=_FIRST)

    def _give(self, request_id: str, token_ids: list[int], params: SamplingParams, *, priority: int) -> None:
        prompt = {"prompt_token_ids": token_ids, "cache_salt": self._salt}
        self._llm.add_request(request_id, prompt, params, priority=priority)

    def step(self) -> list[Any]:
        """Advance the running requests by a token, and return the outputs of those that ended since the last call."""
        while self._waiting and len(self._running) < self._num_places:
            request = self._waiting.popleft()
            self._give(*request, priority=0)
            self._running.add(request[0])
        self.note(self._llm.step())
        ended, self._ended = self._ended, []
        return ended

    def note(self, outputs: Iterable[Any]) -> None:
        """Keep the requests among `outputs` that ended for the next `step`."""
        for output in outputs:
            if output.finished and output.request_id in self._running:
                self._running.remove(output.request_id)
                spans = output.outputs[0].weight_versions or ()
                self._versions[output.request_id] = [(int(span.version), span.end - span.start) for span in spans]
                self._ended.append(output)

    def take_versions(self, request_id: str) -> WeightVersions:
        """Return the versions that sampled a completion which `step` has returned, and forget it."""
        return self._versions.pop(request_id)

    def hold(self) -> None:
        """Stop between two tokens: all tokens so far are of the present weights, and no step is being computed."""
        core = self._llm.engine_core.engine_core
        core.pause_scheduler("keep", clear_cache=False)
        while core.batch_queue:  # steps that were begun before
            self.note(self._llm.step())

    def go_on(self, version: int) -> None:
        """Go on with the weights of `version`, which are in place."""
        self._label(version)
        self._llm.engine_core.engine_core.resume_scheduler()

    def forget(self) -> None:
        """Forget all requests, which vLLM has been told to abort."""
        self._waiting.clear()
        self._running.clear()
        self._ended.clear()
        self._versions.clear()

    def _label(self, version: int) -> None:
        self._salt = str(version)
        self._llm.set_weight_version(self._salt)
