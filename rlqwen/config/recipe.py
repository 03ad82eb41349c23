"""A whole run: what `rlqwen run` reads from YAML."""

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from rlqwen.config.algorithms import config_class, sections
from rlqwen.config.base import Config
from rlqwen.config.data import DataConfig
from rlqwen.config.rollout import RewardSpecs
from rlqwen.config.trainer import TrainerConfig
from rlqwen.errors import ConfigError
from rlqwen.plugins.kinds import TRAINERS


class LoraSettings(Config):
    """Low-rank adapters; PEFT's names."""

    r: int = Field(default=16, ge=1)
    lora_alpha: int | None = Field(default=None, ge=1)
    """None: twice `r`."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    """Names, ends of names, or one regular expression. `all-linear`: every linear layer but the head, without a
    mixture's experts and routers. `experts`, or `gate_proj`, `up_proj`, `down_proj`, reach the experts, `gate` the
    routers; `[all-linear, experts]` is both. Never a vision tower. A name that matches nothing is refused."""
    exclude_modules: str | list[str] | None = None
    """Names, or a regular expression, of modules that get no adapter."""
    target_parameters: list[str] | None = None
    """Parameters by name, such as `mlp.experts.gate_up_proj`; `target_modules` finds a mixture's own by itself."""
    layers_to_transform: int | list[int] | None = None
    """Only these decoder layers, from 0; `target_modules` must then be a list of names."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Module name or regular expression -> another `r`."""
    alpha_pattern: dict[str, int] = Field(default_factory=dict)
    """Module name or regular expression -> another `lora_alpha`."""
    modules_to_save: list[str] | None = None
    """Modules trained fully beside the adapters, such as `embed_tokens`; a tied head stays tied."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Ids of tokens whose rows of the embedding are trained, such as new ones'; a tied head stays tied."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of each output apart from its direction (DoRA, arXiv 2402.09353)."""
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "pissa", "olora"] = True
    """True: B is zero. `pissa` and `olora` take the adapter out of the base weights, and leave no reference."""

    @model_validator(mode="after")
    def _names_for_layers(self) -> "LoraSettings":
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform needs target_modules as a list, such as [q_proj, v_proj] "
                f"(value given: {self.target_modules!r})"
            )
        return self


class QuantizationSettings(Config):
    """Frozen base weights in 4 or 8 bits, by bitsandbytes."""

    bits: Literal[4, 8] = 4
    type: Literal["nf4", "fp4"] = "nf4"
    """4 bits only: the levels; `nf4` are those of a normal distribution (arXiv 2305.14314)."""
    double: bool = True
    """4 bits only: quantise the scales too."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """4 bits only: what the products are taken in. `auto`: bfloat16 on a GPU, float32 on CPU. 8 bits: float16."""


class ModelConfig(Config):
    """The policy's starting weights."""

    path: str
    """Hub id, folder, or `builtin:NAME`: about a million random weights, for tests and the quickstart. Names: tiny-qwen2,
    tiny-qwen3, tiny-qwen3-moe, tiny-qwen3-next, tiny-qwen3.5, tiny-qwen3.5-moe, and these two with `-text` (no vision
    tower)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights that are not trained; trained weights are float32."""
    lora: LoraSettings | None = None
    quantization: QuantizationSettings | None = None
    """Quantise the base weights on loading; needs `lora`."""
    revision: str | None = None
    """Hub revision, to pin the weights. Other models, such as a reference, are pinned by name: `owner/model@revision`."""
    trust_remote_code: bool = False
    init_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments of `from_pretrained`, or of the built-in model."""

    @model_validator(mode="after")
    def _quantized_weights_need_an_adapter(self) -> "ModelConfig":
        if self.quantization is not None and self.lora is None:
            raise ValueError("quantization: quantised weights cannot be trained themselves; set lora, such as {r: 16}")
        return self


def _key_path(fault: str, config: type[TrainerConfig]) -> str:
    """Return a fault of the trainer's config under its key in a recipe: `epsilon: ...` is `train.epsilon: ...` there."""
    key = fault.partition(":")[0].partition(".")[0]
    if key == "output_dir" or key in sections(config):
        return fault
    return f"train.{fault}" if key in config.model_fields else f"train: {fault}"


class Recipe(Config):
    """A run from weights to weights."""

    algorithm: str
    """`sft`, `reward`, `dpo`, `ppo`, `grpo`, another registered trainer (`rlqwen trainers`), `package.module:Class` or
    `file.py:Class`."""
    model: ModelConfig
    data: DataConfig
    rewards: RewardSpecs = Field(default_factory=list)
    train: SerializeAsAny[TrainerConfig]
    """The algorithm's own config: SFTConfig, RewardConfig, DPOConfig, PPOConfig, GRPOConfig."""
    output_dir: str
    """The run folder."""
    resume: Literal["auto"] | None = None
    """`auto`: go on from the newest complete checkpoint of `output_dir` where there is one, else begin."""

    @property
    def reuses_folder(self) -> bool:
        """Return whether `output_dir` may hold a run already: one to be moved aside, or to go on with."""
        return bool(self.train.overwrite_output_dir or self.train.resume_from_checkpoint or self.resume)

    @model_validator(mode="before")
    @classmethod
    def _gather_trainer_config(cls, values: Any) -> Any:
        """Move the sections of the trainer's config, and `output_dir`, from the top of the recipe into the config."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        algorithm = values.get("algorithm")
        if not isinstance(algorithm, str):
            known = ", ".join(TRAINERS.discover())
            raise ValueError(f"algorithm: must be one of {known} (value given: {algorithm!r})")
        config = config_class(algorithm)
        if not isinstance(values.get("train") or {}, dict):
            raise ValueError(f"train: must be a mapping of arguments (value given: {values['train']!r})")
        train = dict(values.get("train") or {})
        for section in sections(config):
            if section in values:
                train[section] = values.pop(section)
        for section in ("rollout", "scoring"):
            if section in values:
                raise ValueError(
                    f"{section!r} has no meaning for algorithm {algorithm!r}: nothing is generated or scored"
                )
        if "output_dir" in values:
            if train.get("output_dir") not in (None, values["output_dir"]):
                raise ValueError(
                    f"train.output_dir: the run folder of a recipe is its output_dir, {values['output_dir']!r}: give "
                    f"output_dir={train['output_dir']} instead (value given: {train['output_dir']!r})"
                )
            train["output_dir"] = values["output_dir"]
        try:
            values["train"] = config(**train)
        except ConfigError as error:
            raise ConfigError("\n".join(_key_path(line, config) for line in str(error).splitlines())) from None
        return values

    @model_validator(mode="after")
    def _rewards_fit_algorithm(self) -> "Recipe":
        if self.train.rewards == "required" and not self.rewards:
            raise ValueError(f"algorithm {self.algorithm!r} needs at least one reward; `rlqwen rewards` lists them")
        if self.train.rewards == "refused" and self.rewards:
            raise ValueError(f"algorithm {self.algorithm!r} takes no rewards")
        return self
