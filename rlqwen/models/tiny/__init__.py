"""Build tiny random Qwens of every class, which the quickstart and the tests train without a model hub."""

from rlqwen.models.tiny.build import BUILTIN_MODELS, PREFIX, build_tiny_qwen3, resolve_model_path
from rlqwen.models.tiny.shape import TinyModelConfig
from rlqwen.models.tiny.tokenizer import build_tokenizer, read_trl_template

__all__ = [
    "BUILTIN_MODELS",
    "PREFIX",
    "TinyModelConfig",
    "build_tiny_qwen3",
    "build_tokenizer",
    "read_trl_template",
    "resolve_model_path",
]
