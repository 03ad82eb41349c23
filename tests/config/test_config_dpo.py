from typing import Any, get_args

import pytest
from trl import DPOConfig as TRLConfig

from rlqwen.config import DPOConfig
from rlqwen.config.dpo import LossName
from rlqwen.errors import ConfigError


def test_defaults_of_dpo_equal_trls() -> None:
    theirs = TRLConfig.__dataclass_fields__
    ours = DPOConfig()
    shared = [
        "beta", "discopop_tau", "f_alpha_divergence_coef", "f_divergence_type", "label_smoothing", "ld_alpha",
        "learning_rate", "loss_weights", "max_length", "precompute_ref_log_probs", "precompute_ref_batch_size",
        "ref_model_mixup_alpha", "ref_model_sync_steps", "sync_ref_model", "truncation_mode", "use_weighting",
    ]  # fmt: skip
    assert {name: getattr(ours, name) for name in shared} == {name: theirs[name].default for name in shared}
    assert ours.loss_type == theirs["loss_type"].default_factory()  # type: ignore[operator]


def test_loss_type_takes_one_loss_or_several() -> None:
    assert DPOConfig(loss_type="ipo").loss_type == ["ipo"]
    assert DPOConfig(loss_type=["ipo", "sft"], loss_weights=[1, 2]).weighted_losses == [("ipo", 1), ("sft", 2)]
    assert DPOConfig(loss_type=["ipo", "sft"]).weighted_losses == [("ipo", 1), ("sft", 1)]


def test_losses_say_whether_they_need_a_reference_or_pairs() -> None:
    every = get_args(LossName)
    configs = {name: DPOConfig(loss_type=name, label_smoothing=0.1 if name == "exo_pair" else 0) for name in every}
    assert {name for name, config in configs.items() if not config.needs_reference} == {"sft", "simpo", "cpo", "orpo"}
    assert {name for name, config in configs.items() if not config.needs_pairs} == {"kto", "sft"}
    assert {name for name, config in configs.items() if config.ranks_pairs} == {"aot", "aot_unpaired"}
    assert DPOConfig(loss_type=["simpo", "sigmoid"]).needs_reference
    assert not DPOConfig(reference_free=True).needs_reference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": []}, "at least 1"),
        ({"loss_type": ["ipo", "ipo"]}, "names a loss twice"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0]}, "1 values for 2 losses"),
        ({"loss_type": "exo_pair"}, "needs label_smoothing above 0"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing does not go with loss_type hinge"),
        ({"loss_type": "kto", "f_divergence_type": "forward_kl"}, "would not cancel"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, "no such form"),
        ({"ld_alpha": 1.5}, "less than or equal to 1"),
        ({"loss_type": ["sigmoid", "aot"], "use_weighting": True}, "use_weighting does not go with loss_type aot"),
        ({"loss_type": "nca_pair", "reference_free": True}, "distance from the reference"),
        ({"reference_free": True, "f_divergence_type": "js_divergence"}, "nothing to diverge from"),
        ({"reference_free": True, "precompute_ref_log_probs": True}, "reference_free is set"),
        ({"loss_type": "orpo", "ref_model": "folder"}, "orpo uses none"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "cannot be precomputed"),
        ({"beta": 0}, "greater than 0"),
        ({"rpo_alpha": 1.0}, r"use loss_type: \[sigmoid, sft\]"),
        ({"loss_tpye": "ipo"}, "did you mean 'loss_type'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_wrong_combinations_are_refused_with_the_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DPOConfig(**options)
