"""Prepare each process of a vLLM engine for Qwen3.5; vLLM imports this module before it builds the model."""

from rlqwen.rollout.engines import vllm_object_store
from rlqwen.rollout.engines.vllm_qwen3_5 import register

register()


class WorkerExtension(vllm_object_store.WorkerExtension):
    """A mixin for vLLM's worker that adds nothing; its import is what counts."""
