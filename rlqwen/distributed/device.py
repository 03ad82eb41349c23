"""Choose the device that this rank computes on, and the dtype."""

import ctypes
import functools
import os

import torch

from rlqwen.config import TrainerConfig

_MALLOC_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of glibc's <malloc.h>."""


def pick_device(use_cpu: bool) -> torch.device:
    """Return this rank's GPU, made the current one for libraries that name none, or the CPU if there is no GPU."""
    if use_cpu or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def compute_dtype(args: TrainerConfig, device: torch.device | str) -> torch.dtype:
    """Return the dtype of forward passes on a device, as `bf16` and `fp16` say or, by default, as the device can."""
    if args.fp16:
        return torch.float16
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if (on_gpu if args.bf16 is None else args.bf16) else torch.float32


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, up to its peak, instead of giving it back to the system.

    By default glibc maps each large tensor anew, and the system clears it page by page: a fifth of an update's time. Does
    nothing under another C library, or if a variable of the environment already tunes glibc's malloc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _MALLOC_VARIABLES):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
