"""What vLLM imports in each process of an engine for Qwen3.5, before the model is built."""

from rlqwen.rollout.engines.vllm_qwen3_5 import register

register()


class WorkerExtension:
    """A mixin for vLLM's worker that adds nothing; its import is what counts."""
