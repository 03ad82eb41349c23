"""Measure, on a model without weights, what the memory of a recipe depends on."""

import contextlib
import functools
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.config import ModelConfig, Recipe
from rlqwen.errors import ModelError
from rlqwen.preflight.layer_shapes import LayerShape, layer_shapes
from rlqwen.preflight.model_check import ConfigFacts, read_config
from rlqwen.preflight.parameter_counts import ParameterCounts, count_parameters, meta_model, trained_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTIZED = ("attention", "delta-net", "MLP", "shared experts")
"""Groups of linear layers that bitsandbytes quantizes; it leaves fused experts, embedding and head as they are."""


@dataclass(frozen=True)
class ModelSize:
    """Hold what the memory of a model depends on besides the recipe."""

    facts: ConfigFacts
    model: "PreTrainedModel"
    """The text model on the meta device, adapters included."""
    counts: ParameterCounts
    trained: dict[str, int]
    """Trained parameters by the names of the modules that they belong to; under the empty name all weights."""
    notes: list[str]
    """Notes on what `target_modules` matched."""
    frozen_bytes: int
    """Bytes of the frozen weights."""
    others: dict[str, int]
    """Parameters of the frozen models that the recipe names, by key, such as `teacher`; those that can be read now."""

    @classmethod
    def measure(
        cls,
        recipe: Recipe,
        facts: ConfigFacts,
        model: "PreTrainedModel | None" = None,
        read: Callable[[ModelConfig, Path], ConfigFacts | None] = read_config,
    ) -> "ModelSize":
        """Measure the model of `facts` as the recipe trains it; raise ModelError if its adapter does not fit.

        `model`: what `meta_model` built from `facts.config`, which is changed by an adapter; None: build it. `read`: how
        configs of other models are read.
        """
        model = model or meta_model(facts.config, scalar=recipe.train.trains_scalar_model)
        counts = count_parameters(facts.config, model, facts.folder)
        others = _other_models(recipe, read)
        if recipe.model.lora is None:
            return cls(facts, model, counts, {"": counts.total}, [], 0, others)
        trained, notes = trained_parameters(model, recipe.model.lora)
        return cls(facts, model, counts, trained, notes, _frozen_bytes(recipe.model, facts, counts), others)

    def with_lora(self, recipe: Recipe) -> "ModelSize":
        """Measure the same model as another recipe adapts it."""
        return replace(ModelSize.measure(recipe, self.facts), others=self.others)

    @functools.cached_property
    def shapes(self) -> Counter[LayerShape]:
        """Return the different shapes of the decoder layers, and how many layers have each."""
        return layer_shapes(self.model, self.text_config)

    @functools.cached_property
    def text_config(self) -> Any:
        return self.facts.config.get_text_config()

    @property
    def total(self) -> int:
        return self.counts.total

    @property
    def num_trained(self) -> int:
        return sum(self.trained.values())

    @property
    def adapters(self) -> frozenset[str] | None:
        """Return the names of the layers with an adapter; None if all weights are trained."""
        if "" in self.trained:
            return None
        return frozenset(name.rpartition(".")[2] for name in self.trained)


def frozen_dtype(settings: ModelConfig, facts: ConfigFacts) -> str:
    """Return the dtype of weights that are not trained."""
    return facts.dtype if settings.dtype == "auto" else settings.dtype


def _frozen_bytes(settings: ModelConfig, facts: ConfigFacts, counts: ParameterCounts) -> int:
    width = _BYTES.get(frozen_dtype(settings, facts), 4)
    size = counts.total * width
    if settings.quantization is not None:
        quantized = sum(counts.parts.get(part, 0) for part in _QUANTIZED)
        size -= int(quantized * (width - settings.quantization.bits / 8))
    return size


def _other_models(recipe: Recipe, read: Callable[[ModelConfig, Path], ConfigFacts | None]) -> dict[str, int]:
    sizes = {}
    named = recipe.train.other_models()
    critic = getattr(recipe.train, "critic", None)
    if critic is not None and critic.path is not None:
        named = named | {"critic": critic.path}
    for key, path in named.items():
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(ModelError):
            facts = read(ModelConfig(path=path), Path(scratch))
            if facts is not None:
                sizes[key] = count_parameters(facts.config, meta_model(facts.config), facts.folder).total
    return sizes
