"""Configure direct preference optimization and its relatives."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from rlqwen.config.base import PathText
from rlqwen.config.preference import PreferenceConfig
from rlqwen.config.reference import SyncedReference
from rlqwen.plugins.kinds import LOSSES

LossName = Literal[
    "sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "simpo", "cpo", "orpo", "kto",
]  # fmt: skip
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

NO_REFERENCE = frozenset({"sft", "simpo", "cpo", "orpo"})
"""Losses that use the policy's log-probabilities alone."""
SMOOTHED = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"})
"""Losses that model labels which may be flipped."""
OF_DIFFERENCE = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"})
"""Losses of the difference between the two answers' scores, in which terms of the prompt alone cancel."""
RANKING = frozenset({"aot", "aot_unpaired"})
"""Losses that sort the pairs of a whole update."""
UNPAIRED = frozenset({"kto", "sft"})
"""Losses that need no pairs, because a single answer with a label is enough."""


class DPOConfig(PreferenceConfig, SyncedReference):
    """Configure DPOTrainer: learn from chosen and rejected answers (DPO, arXiv 2305.18290, and its relatives).

    Names, meanings and defaults are TRL's unless a field says otherwise.

    `per_device_train_batch_size` counts rows: pairs, or single answers with a label.
    """

    trainer: ClassVar[str] = "rlqwen.trainers.dpo:DPOTrainer"
    next_command: ClassVar[str] = (
        "rlqwen eval {final} --data PROMPTS --rewards REWARD -k 8     (rlqwen rewards lists rewards)"
    )

    refused: ClassVar[dict[str, str]] = PreferenceConfig.refused | {
        "rpo_alpha": "use loss_type: [sigmoid, sft] with loss_weights: [1, rpo_alpha]",
        "max_completion_length": "use max_length, which bounds prompt and answer together",
        "router_aux_loss_coef": "leave it out: the router's load-balancing loss is not trained",
        "generate_during_eval": "use `rlqwen eval` on the trained model",
        "model_adapter_name": "give a PeftModel: the reference is the model as given",
        "ref_adapter_name": "give ref_model, or a PeftModel: the reference is the model as given",
        "force_use_ref_model": "leave it out: ref_model is used wherever it is given",
        "use_logits_to_keep": "logprobs are computed for answer tokens only already",
    }

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is kept close to the reference: IPO's tau, and in SimPO, CPO and ORPO the scale of the
    margin."""
    loss_type: list[str] = Field(default=["sigmoid"], min_length=1)
    """One loss, or several that are added; rlqwen.algorithms.losses.preference has formulas and papers. Beyond TRL's
    losses: `simpo`, `cpo`, `orpo` (no reference) and `kto` (pairs or labeled answers). Also another registered loss of
    pairs (`rlqwen losses`), `package.module:function` or `file.py:function`, which gets a reference."""
    loss_args: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Ours: name of a loss -> its arguments that are not fields of this config."""
    loss_weights: list[float] | None = None
    """One weight per loss. None: 1 each."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels. `sigmoid` and `sigmoid_norm` (ours) become conservative DPO."""
    f_divergence_type: FDivergence = "reverse_kl"
    """The divergence that keeps the policy near the reference (f-DPO, arXiv 2309.16240)."""
    f_alpha_divergence_coef: float = 0.5
    """The alpha of `alpha_divergence`."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the tokens by which an answer is longer than the other of its pair (LD-DPO, arXiv 2409.06411). None:
    1."""
    use_weighting: bool = False
    """Weight pairs by how likely the policy is to generate them (WPO, arXiv 2406.11827)."""
    reference_free: bool = False
    """Ours (formerly TRL's): assume a uniform reference, and load none."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """Temperature of `discopop`."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """Target margin of `simpo`, in units of the reward."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the chosen answers' negative log-likelihood in `cpo`."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of good answers in `kto`."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of bad answers in `kto`."""

    ref_model: PathText | None = None
    """Ours, for recipes: folder or hub id of the reference. None: the model before training."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probabilities once before training, store them on disk, and free the reference."""
    precompute_ref_batch_size: int | None = Field(default=None, ge=1)
    """Rows per forward pass when precomputing. None: `per_device_train_batch_size`, and for evaluation rows
    `per_device_eval_batch_size`."""

    def other_models(self) -> dict[str, str]:
        return {} if self.ref_model is None else {"ref_model": self.ref_model}

    @property
    def needs_reference(self) -> bool:
        """Return whether a loss compares the policy with a reference."""
        return not self.reference_free and not NO_REFERENCE.issuperset(self.loss_type)

    @property
    def needs_pairs(self) -> bool:
        """Return whether a setting or a loss compares two answers to a prompt."""
        return self.ld_alpha is not None or not UNPAIRED.issuperset(self.loss_type)

    @property
    def ranks_pairs(self) -> bool:
        """Return whether a loss needs all pairs of an update at once."""
        return bool(RANKING.intersection(self.loss_type))

    @property
    def weighted_losses(self) -> list[tuple[str, float]]:
        """Return each loss with its weight."""
        return list(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    @field_validator("loss_type", mode="before")
    @classmethod
    def _accept_one(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _losses_fit_together(self) -> "DPOConfig":
        every = frozenset(get_args(LossName))
        plugins = frozenset(self.loss_type) - every
        for name in plugins:
            LOSSES.check_name(name, "loss_type", sorted(every))
        if unnamed := self.loss_args.keys() - set(self.loss_type):
            raise ValueError(f"loss_args: {min(unnamed)!r} is not among loss_type {', '.join(self.loss_type)}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} values for {len(self.loss_type)} losses "
                f"({', '.join(self.loss_type)}); give one each"
            )
        if len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError(f"loss_type names a loss twice: {', '.join(self.loss_type)}; use loss_weights")
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError("exo_pair needs label_smoothing above 0; its paper recommends 1e-3")
        if self.label_smoothing and not plugins and not SMOOTHED.intersection(self.loss_type):
            raise ValueError(_unfit("label_smoothing", self.loss_type, SMOOTHED, "it is not used there"))
        for option, given, fitting, reason in (
            (
                f"f_divergence_type={self.f_divergence_type!r}",
                self.f_divergence_type != "reverse_kl",
                OF_DIFFERENCE | {"sft"},
                "a term of the prompt would not cancel",
            ),
            ("ld_alpha", self.ld_alpha is not None, every - {"simpo", "cpo", "orpo", "kto"}, "it has no such form"),
            (
                "use_weighting",
                self.use_weighting,
                every - RANKING - {"sft", "cpo", "orpo", "kto"},
                "it is not a mean over pairs, which could be weighted",
            ),
            (
                "reference_free",
                self.reference_free,
                OF_DIFFERENCE | RANKING | NO_REFERENCE,
                "each answer is judged by its distance from the reference",
            ),
        ):
            unfit = [loss for loss in self.loss_type if loss not in fitting and loss not in plugins]
            if given and unfit:
                raise ValueError(_unfit(option, unfit, fitting, reason))
        return self

    @model_validator(mode="after")
    def _reference_fits(self) -> "DPOConfig":
        if self.reference_free and self.f_divergence_type != "reverse_kl":
            raise ValueError("reference_free leaves nothing to diverge from: leave out f_divergence_type")
        wants = [
            name
            for name, given in (
                ("sync_ref_model", self.sync_ref_model),
                ("precompute_ref_log_probs", self.precompute_ref_log_probs),
                ("ref_model", self.ref_model is not None),
            )
            if given
        ]
        if wants and not self.needs_reference:
            why = "reference_free is set" if self.reference_free else f"{', '.join(self.loss_type)} uses none"
            raise ValueError(f"{wants[0]} has no meaning without a reference: {why}")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model moves the reference, so its log-probabilities cannot be precomputed")
        return self


def _unfit(option: str, losses: Sequence[str], fitting: frozenset[str], reason: str) -> str:
    names = ", ".join(losses)
    return f"{option} does not go with loss_type {names}: {reason}; it goes with {', '.join(sorted(fitting))}"
