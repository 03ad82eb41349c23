"""Record which experts each token of a request passed in vLLM, where vLLM itself cannot say.

vLLM 0.32 returns experts (`enable_return_routed_experts`) from its second model runner alone, which needs Triton and so
has no CPU. There the routers' own capture hook is read after each step instead, in the engine's process.

Shapes: T tokens of a step, L decoder layers, K experts per token.
"""

import hashlib
from collections.abc import Iterator, Sequence
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
        self._prompts: dict[str, list[int]] = {}
        """Internal id -> prompt, of requests whose blocks are not kept yet."""
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
            if request_id not in self._requests:
                self._prompts[request_id] = list(self._runner.requests[request_id].prompt_token_ids)
            self._requests.setdefault(request_id, []).append((int(batch.num_computed_tokens_cpu[place]), rows))
            start += count
        return result

    def take(self, request_id: str, prompt: Sequence[int], num_sampled: int) -> np.ndarray:
        """Return the (prompt + sampled - 1, L, K) experts of a request that finished, and forget it."""
        self._keep_blocks()
        found = [name for name in self._requests if name.rpartition("-")[0] == request_id]
        whole = self._experts_of(found, len(prompt) + num_sampled - 1)
        for name in found:
            del self._requests[name]
            self._prompts.pop(name, None)
        for block, digest in self._blocks_of(prompt):
            if (whole[block] == NOT_RECORDED).all(
                (1, 2)
            ).any() and digest in self._blocks:  # it came from the prefix cache
                whole[block] = self._blocks[digest]
        return whole

    def _experts_of(self, names: Sequence[str], count: int) -> np.ndarray:
        """Return the (count, L, K) experts that the steps of a request recorded, by its internal ids."""
        whole = np.full((count, *self._shape), NOT_RECORDED, dtype=np.int16)
        for name in names:
            for first, rows in self._requests[name]:
                if first < count:
                    whole[first : first + len(rows)] = rows[: count - first]
        return whole

    def _keep_blocks(self) -> None:
        """Keep the blocks of all prompts that have passed, because the prefix cache gives them to others from then on."""
        for name, prompt in list(self._prompts.items()):
            whole = self._experts_of([name], len(prompt))
            if (whole[-1] == NOT_RECORDED).all():
                continue  # a part of it is yet to come
            del self._prompts[name]
            for block, digest in self._blocks_of(prompt):
                if digest not in self._blocks and not (whole[block] == NOT_RECORDED).all((1, 2)).any():
                    self._blocks[digest] = whole[block].copy()

    def _blocks_of(self, prompt: Sequence[int]) -> Iterator[tuple[slice, bytes]]:
        """Full blocks of a prompt, and a digest of all up to the end of each."""
        digest = b""
        for start in range(0, len(prompt) - self._block_size + 1, self._block_size):
            block = slice(start, start + self._block_size)
            digest = hashlib.blake2b(digest + np.asarray(prompt[block], dtype=np.int64).tobytes()).digest()
            yield block, digest

    def forget_requests(self) -> None:
        """Forget requests that were given up."""
        self._requests.clear()
        self._prompts.clear()

    def forget_prompts(self) -> None:
        """Forget what the prefix cache no longer holds."""
        self._blocks.clear()
