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

from pathlib import Path

import pytest

from rlqwen.tiny import build_tiny_qwen3

pytest_plugins = ["fault_table", "pytester"]


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
