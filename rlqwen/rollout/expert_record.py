"""Which experts each token of a request passed in vLLM, where vLLM itself cannot say.

vLLM 0.32 returns experts (`enable_return_routed_experts`) from its second model runner alone, which needs Triton and so
has no CPU. There the routers' own capture hook is read after each step instead, in the engine's process.

Shapes: T tokens of a step, L decoder layers, K experts per token.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

NOT_RECORDED = -1


class ExpertRecord:
    """Experts of the requests in flight, by position, and of prompts whose blocks the prefix cache may hold."""

    def __init__(self, worker: Any, block_size: int) -> None:
        """Hook into the routers and the model runner of `worker`, which lives in this process."""
        self._runner: Any = worker.model_runner
        self._block_size = block_size
        self._steps: dict[int, np.ndarray] = {}
        """Layer -> (T, K) of the step that runs."""
        self._requests: dict[str, list[tuple[int, np.ndarray]]] = {}
        """Internal id of a request -> first position and (T, L, K) of each step that it was part of."""
        self._blocks: dict[bytes, np.ndarray] = {}
        """Digest of a prompt up to the end of a block -> the block's (tokens, L, K)."""
        config = worker.model_config
        self._shape = (config.get_total_num_hidden_layers(), config.get_num_experts_per_tok())
        for module in worker.get_model().modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(self._capture_of(module.layer_id))
        self._execute = self._runner.execute_model
        self._runner.execute_model = self._execute_and_record

    def _capture_of(self, layer: int) -> Any:
        def capture(experts_TK: Any) -> None:
            self._steps[layer] = experts_TK.detach().cpu().numpy().astype(np.int16)

        return capture

    def _execute_and_record(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._steps.clear()
        result = self._execute(scheduler_output, *args, **kwargs)
        if not self._steps:
            return result
        start, batch = 0, self._runner.input_batch
        for place, request_id in enumerate(batch.req_ids):
            count = scheduler_output.num_scheduled_tokens.get(request_id, 0)
            rows = np.full((count, *self._shape), NOT_RECORDED, dtype=np.int16)
            for layer, experts in self._steps.items():
                rows[:, layer] = experts[start : start + count]
            self._requests.setdefault(request_id, []).append((int(batch.num_computed_tokens_cpu[place]), rows))
            start += count
        return result

    def take(self, request_id: str, prompt: Sequence[int], num_sampled: int) -> np.ndarray:
        """Return the (prompt + sampled - 1, L, K) experts of a request that finished, and forget it."""
        whole = np.full((len(prompt) + num_sampled - 1, *self._shape), NOT_RECORDED, dtype=np.int16)
        found = [name for name in self._requests if name.rpartition("-")[0] == request_id]
        for name in found:
            for first, rows in self._requests.pop(name):
                whole[first : first + len(rows)] = rows[: len(whole) - first]
        self._share_blocks(prompt, whole)
        return whole

    def _share_blocks(self, prompt: Sequence[int], whole: np.ndarray) -> None:
        """Fill in the blocks that came from the prefix cache, and keep those that it may give to others."""
        digest = b""
        for start in range(0, len(prompt) - self._block_size + 1, self._block_size):
            block = slice(start, start + self._block_size)
            digest = hashlib.blake2b(digest + np.asarray(prompt[block], dtype=np.int64).tobytes()).digest()
            known = self._blocks.get(digest)
            if (whole[block] == NOT_RECORDED).all((1, 2)).any():
                if known is not None:
                    whole[block] = known
            elif known is None:
                self._blocks[digest] = whole[block].copy()

    def forget_requests(self) -> None:
        """Forget requests that were given up."""
        self._requests.clear()

    def forget_prompts(self) -> None:
        """Forget what the prefix cache no longer holds."""
        self._blocks.clear()
