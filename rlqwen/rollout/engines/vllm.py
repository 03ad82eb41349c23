"""Run vLLM in Ray workers. This module imports neither vLLM nor torch; rlqwen.rollout.engines.vllm_engine does."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlqwen.config import RolloutConfig
from rlqwen.rollout.engine import Engine
from rlqwen.rollout.engines.vllm_served_model import engine_dtype
from rlqwen.rollout.resources import samples_on_gpu
from rlqwen.rollout.worker_protocol import EngineSettings

if TYPE_CHECKING:
    from rlqwen.rollout.engines.vllm_engine import VllmEngine


class Vllm(Engine):
    """Sample with vLLM in Ray workers."""

    title = "vLLM"
    in_workers = True
    loads_adapters = True
    returns_experts = True
    sleeps = True
    updates_in_flight = True
    weight_transfers = ("object_store", "ipc", "nccl")

    @classmethod
    def why_unavailable(cls) -> str | None:
        missing = [name for name in ("vllm", "ray") if find_spec(name) is None]
        if not missing:
            return None
        return (
            f"{' and '.join(missing)} can't be imported: pip install 'rlqwen[cuda]' or 'rlqwen[cpu]', or set rollout.engine "
            "to transformers"
        )

    @classmethod
    def choose_dtype(cls, config: RolloutConfig, model_path: str, compute_dtype: str) -> tuple[str, str | None]:
        return engine_dtype(config, model_path, compute_dtype, on_gpu=samples_on_gpu(config))

    @classmethod
    def keeps_ties(cls, device_type: str) -> bool:
        return device_type == "cpu"

    @classmethod
    def set_environment(cls, settings: EngineSettings) -> None:
        """Switch usage reports off; log errors, not progress."""
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        )
        if settings.sleep_level and "expandable_segments" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
            del os.environ["PYTORCH_CUDA_ALLOC_CONF"]  # the trainer's; vLLM's allocator for sleep cannot work with it
        if not os.environ.get("CUDA_VISIBLE_DEVICES"):
            os.environ.update(
                VLLM_CPU_KVCACHE_SPACE=str(settings.kv_cache_gib),
                # "auto" would set a core aside and pin two workers to the same ones.
                VLLM_CPU_OMP_THREADS_BIND="nobind",
                # vLLM compiles its ranking of logprobs even in eager mode: 6 s at the first step, and no gain on CPU.
                TORCH_COMPILE_DISABLE="1",
            )

    @classmethod
    def start(cls, settings: EngineSettings) -> "VllmEngine":
        from rlqwen.rollout.engines.vllm_engine import VllmEngine

        return VllmEngine(settings)
