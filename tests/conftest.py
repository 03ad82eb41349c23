"""What several test files share: a tiny model on disk, and quiet, offline libraries."""

import atexit
import os
import shutil
import tempfile

if "RLQWEN_CACHE" not in os.environ:
    os.environ["RLQWEN_CACHE"] = tempfile.mkdtemp(prefix="rlqwen-cache-")
    atexit.register(shutil.rmtree, os.environ["RLQWEN_CACHE"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RLQWEN_DISPLAY", "off")

import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from rlqwen.models.tiny import build_tiny_qwen3

# A shell that runs the tests in the background has them ignore Ctrl-C, and with them the processes that they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.fault_table", "tests.slow_list", "pytester"]


LONGEST_FIRST = (
    "test_learning.py", "test_commands.py", "test_pool.py", "test_ranks.py", "test_zero.py",
    "test_tensor_parallel.py", "test_shipped_recipes.py", "test_vllm_lora.py", "test_processes.py",
    "test_ray_cluster.py", "test_sequence_parallel.py", "test_end_to_end.py", "test_scorer.py",
)  # fmt: skip
"""Files that would hold the end up if one of two workers began one of them last."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have a test draw the same numbers alone and after others."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of some hundred thousand parameters with its tokenizer."""
    return build_tiny_qwen3(
        tmp_path_factory.mktemp("tiny") / "qwen3",
        hidden_size=64,
        num_layers=2,
        intermediate_size=128,
        num_heads=2,
        num_kv_heads=1,
    )
