"""Make recipes and model sizes of published models for the tests of plans."""

import functools
from typing import Any

from rlqwen.config import Recipe
from rlqwen.planning.published_models import published_config
from rlqwen.preflight.model_check import ConfigFacts
from rlqwen.preflight.model_size import ModelSize


def sft(name: str, tokens: int, *, train: Any = None, **changes: Any) -> Recipe:
    """Return a recipe with one packed row of `tokens` per micro-batch."""
    values = {
        "algorithm": "sft",
        "model": {"path": f"Qwen/{name}"},
        "data": {"train": {"path": "builtin:questions", "columns": {"instruction": "question", "output": "answer"}}},
        "train": {"max_length": tokens, "packing": True, "per_device_train_batch_size": 1} | (train or {}),
        "output_dir": "runs/plan",
    }
    return Recipe.parse(values | changes)


@functools.cache
def size_of(name: str) -> ModelSize:
    """Measure a published model as full fine-tuning trains it."""
    config = published_config(name)
    assert config is not None
    context = config.get_text_config().max_position_embeddings
    return ModelSize.measure(sft(name, 4096), ConfigFacts(f"Qwen/{name}", {}, config, context, "bfloat16", 0))
