"""Train models: one loop, and a `step` per algorithm."""

import os

import torch

if not torch.cuda.is_available():
    # Without it DeepSpeed, which transformers imports, looks for accelerators and prints that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
