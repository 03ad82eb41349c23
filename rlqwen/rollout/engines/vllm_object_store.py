"""Bring weights from Ray's object store into vLLM by its weight-transfer protocol, as its own engines do on GPUs.

The protocol has four phases: init once; then, per sync, start, an update per bucket of weights, and finish. vLLM imports
this module in each process of an engine, which registers the backend there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "object_store"
WORKER_EXTENSION = "rlqwen.rollout.engines.vllm_object_store.WorkerExtension"


@dataclass
class ObjectStoreInit(WeightTransferInitInfo):
    """Need nothing: there is no connection to the trainer."""


@dataclass
class ObjectStoreUpdate(WeightTransferUpdateInfo):
    """Carry one bucket of weights."""

    names: list[str]
    tensors: list[torch.Tensor]
    """On the CPU; views of the object store if the engine runs in the worker's own process."""


def update_of(bucket: Sequence[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Return the arguments of vLLM's `update_weights` for a bucket of weights."""
    names, tensors = zip(*bucket, strict=True)
    return {"update_info": {"names": list(names), "tensors": list(tensors)}}


class ObjectStoreTransfer(WeightTransferEngine[ObjectStoreInit, ObjectStoreUpdate]):
    """Load buckets of weights in checkpoint format, layer by layer."""

    init_info_cls = ObjectStoreInit
    update_info_cls = ObjectStoreUpdate

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        """Do nothing, because the buckets come with the updates."""

    def start_weight_update(self) -> None:
        """Prepare every layer to take new weights."""
        if self.device.type == "cpu":
            _forget_expert_layout(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; unlike in the base class the CPU, which has no streams, need not be waited for."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        """Load one bucket."""
        model: Any = self.model
        with disable_mtp_completeness_check():
            model.load_weights(zip(update_info.names, update_info.tensors, strict=True))

    def finish_weight_update(self) -> None:
        """Finish layers that are not complete by themselves, such as attention."""
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]

    def shutdown(self) -> None:
        """Do nothing, because there is no connection."""


def _forget_expert_layout(model: torch.nn.Module) -> None:
    """Have experts packed for the CPU's kernels again at the next reload, which vLLM 0.32 does only where no kernel is
    there yet (UnquantizedFusedMoEMethod._setup_kernel): it would read plain weights as packed ones."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class WorkerExtension:
    """A mixin for vLLM's worker that adds nothing; its import is what counts."""


WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreTransfer)
