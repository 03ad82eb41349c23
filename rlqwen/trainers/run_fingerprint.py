"""Record what the result of a run depends on, so that a resumed run can be refused if that has changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rlqwen.checkpoint.fingerprint import (
    config_fingerprint,
    digest_rows,
    digest_tokenizer,
    flatten,
    package_fingerprint,
)
from rlqwen.config import Recipe, TrainerConfig
from rlqwen.distributed import Ranks
from rlqwen.models.carried_weights import carried_by
from rlqwen.models.packed_model import PackedModel
from rlqwen.models.policy import Policy
from rlqwen.models.reference_cache import digest_config, digest_weights
from rlqwen.secrets import redact_values


def run_fingerprint(
    algorithm: str,
    args: TrainerConfig,
    *,
    model: PackedModel,
    processing_class: PreTrainedTokenizerBase,
    train_digest: str,
    eval_rows: Sequence[Any] | None,
    ranks: Ranks,
    recipe: Recipe | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a flat mapping from dotted names to JSON values; of the weights, as they are now.

    `more`: entries of the algorithm, such as the digests of its rewards or of a critic, and settings that are resolved.
    """
    found: dict[str, Any] = {
        "algorithm": algorithm,
        "world_size": ranks.world_size,
        "device": model.device.type,
        **package_fingerprint(),
        "model.weights": digest_weights(model.model.state_dict()),
        "model.config": digest_config(model.base_model.config),
        "model.dtype": f"{model.original_dtype}, computing in {model.compute_dtype}",
        "tokenizer": digest_tokenizer(processing_class),
        "data.train": train_digest,
        "data.eval": digest_rows(eval_rows) if eval_rows else None,
        **config_fingerprint(args),
        **more,
    }
    carried = carried_by(model.base_model)
    if carried and carried.weights:
        found["model.carried"] = carried.digest()
    if recipe is not None:
        found |= flatten([spec.model_dump(mode="json") for spec in recipe.rewards], "rewards")
    if isinstance(model.model, PeftModel):
        for name, config in model.model.peft_config.items():
            found |= flatten(config.to_dict(), f"adapter.{name}")
    if isinstance(model, Policy) and model.has_reference and not model.has_adapter:
        found["reference.weights"] = digest_weights(model.reference_weights())
    return redact_values(found)  # type: ignore[no-any-return]  # a recipe may quote a secret to a reward
