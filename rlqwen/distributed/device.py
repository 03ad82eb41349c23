"""Pick the device that this process trains on."""

import os

import torch


def pick_device(use_cpu: bool) -> torch.device:
    """Return this rank's GPU, made the current one for libraries that name none, or the CPU if there is no GPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
