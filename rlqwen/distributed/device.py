"""The device that this process trains on."""

import os

import torch


def pick_device(use_cpu: bool) -> torch.device:
    """The GPU of this rank where there is one, else the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
