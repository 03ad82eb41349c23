"""Save and restore the RNG states of a process: Python's, numpy's, torch's and CUDA's."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def get_rng_state() -> dict[str, Any]:
    """Return all RNG states as JSON values and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states returned by `get_rng_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore all RNG states on leaving the context.

    For work that a run does once per process, such as starting an engine, so that a resumed run draws the same numbers.
    """
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
