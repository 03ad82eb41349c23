"""Define a recipe: what `rlqwen run` reads from YAML."""

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from rlqwen.config.algorithms import config_class, sections
from rlqwen.config.base import Config, PathText
from rlqwen.config.data import DataConfig
from rlqwen.config.rollout import RewardSpecs
from rlqwen.config.trainer import TrainerConfig
from rlqwen.errors import ConfigError, quoted
from rlqwen.plugins.kinds import TRAINERS
from rlqwen.plugins.registry import nearest


class LoraSettings(Config):
    """Low-rank adapters, by PEFT's names."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    lora_alpha: int | None = Field(default=None, ge=1)
    """Scale of the adapters, which is divided by `r`. None: twice `r`."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability in front of the adapters."""
    target_modules: str | list[str] = "all-linear"
    """Names, ends of names, or one regular expression. `all-linear`: every linear layer except the head, without a
    mixture's experts and routers. `experts`, or `gate_proj`, `up_proj`, `down_proj`, include the experts, and `gate`
    the routers; `[all-linear, experts]` is both. A vision tower is never included. A name that matches nothing is
    refused."""
    exclude_modules: str | list[str] | None = None
    """Names, or a regular expression, of modules that get no adapter. None: no exceptions."""
    target_parameters: list[str] | None = None
    """Parameters by name, such as `mlp.experts.gate_up_proj`. None: those of a mixture that `target_modules` finds."""
    layers_to_transform: int | list[int] | None = None
    """Decoder layers that get adapters, from 0; `target_modules` must then be a list of names. None: all layers."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Module name or regular expression -> another `r`."""
    alpha_pattern: dict[str, int] = Field(default_factory=dict)
    """Module name or regular expression -> another `lora_alpha`."""
    modules_to_save: list[str] | None = None
    """Modules whose weights are all trained besides the adapters, such as `embed_tokens`; a tied head stays tied. None:
    no modules."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Ids of tokens whose embedding rows are trained, such as new tokens; a tied head stays tied. None: no rows."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of each output separately from its direction (DoRA, arXiv 2402.09353)."""
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "pissa", "olora"] = True
    """Initial weights. True: B is zero. `pissa` and `olora` move a part of the base weights into the adapter, so that
    no reference is left."""

    @model_validator(mode="after")
    def _names_for_layers(self) -> "LoraSettings":
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform needs target_modules as a list, such as [q_proj, v_proj] "
                f"(value given: {quoted(self.target_modules)})"
            )
        return self


class QuantizationSettings(Config):
    """Quantize frozen base weights to 4 or 8 bits with bitsandbytes."""

    bits: Literal[4, 8] = 4
    """Bits per weight."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The levels of 4-bit weights; `nf4` has those of a normal distribution (arXiv 2305.14314)."""
    double: bool = True
    """Quantize the scales of 4-bit weights, too."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of products with 4-bit weights. `auto`: bfloat16 on GPU, float32 on CPU. With 8 bits it is always
    float16."""


class ModelConfig(Config):
    """The weights that the policy starts from."""

    path: PathText
    """Hub id, folder, or `builtin:NAME`: about a million random weights, for tests and the quickstart. Names:
    tiny-qwen2, tiny-qwen3, tiny-qwen3-moe, tiny-qwen3-next, tiny-qwen3.5, tiny-qwen3.5-moe, and the last two with
    `-text` (no vision tower)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of frozen weights; trained weights are float32. `auto`: the checkpoint's."""
    lora: LoraSettings | None = None
    """Low-rank adapters to train instead of the weights. None: train all weights."""
    quantization: QuantizationSettings | None = None
    """Quantize the base weights on loading; needs `lora`. None: do not."""
    revision: str | None = None
    """Hub revision, which pins the weights. Other models, such as a reference, are pinned by name:
    `owner/model@revision`. None: the newest."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    init_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments of `from_pretrained`, or of the built-in model."""

    @model_validator(mode="after")
    def _quantized_weights_need_an_adapter(self) -> "ModelConfig":
        if self.quantization is not None and self.lora is None:
            raise ValueError("quantization: quantized weights cannot be trained themselves; set lora, such as {r: 16}")
        return self


class Recipe(Config):
    """One run: the weights it starts from, its data, its algorithm and that algorithm's settings."""

    algorithm: str
    """What trains the model: a registered name (`rlqwen trainers` lists them), such as `sft`, `reward`, `dpo`, `ppo` or
    `grpo`; `package.module:Class`; or `path/to/file.py:Class`."""
    model: ModelConfig
    """The weights to start from."""
    data: DataConfig
    """Training and evaluation rows."""
    rewards: RewardSpecs = Field(default_factory=list)
    """What scores completions. Required by algorithms that sample, refused by those that do not."""
    train: SerializeAsAny[TrainerConfig]
    """The algorithm's own config, such as GRPOConfig. Its fields that are sections (mappings with keys of their own, such as
    `rollout`) may stand at the top of the recipe instead."""
    output_dir: PathText
    """The run folder."""
    resume: Literal["auto"] | None = None
    """`auto`: resume from the newest complete checkpoint in `output_dir`, or begin if there is none. None: begin."""

    @property
    def reuses_folder(self) -> bool:
        """Return whether `output_dir` may hold a run already, which is moved aside or resumed."""
        return bool(self.train.overwrite_output_dir or self.train.resume_from_checkpoint or self.resume)

    @classmethod
    def sections_of(cls, config: type[TrainerConfig]) -> list[str]:
        """Return the fields of a trainer's config that may stand at the top of a recipe.

        A section that is named like a key of the recipe, such as `model`, stands under `train` only.
        """
        return [name for name in sections(config) if name not in cls.model_fields]

    @model_validator(mode="before")
    @classmethod
    def _gather_trainer_config(cls, values: Any) -> Any:
        """Build the trainer's config from `train`, the sections at the top, and `output_dir`."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        config = _config_class(values.get("algorithm"))
        if not isinstance(values.get("train") or {}, dict):
            raise ValueError(f"train: must be a mapping of arguments (value given: {quoted(values['train'])})")
        train = dict(values.get("train") or {})
        at_top = cls.sections_of(config)
        for name in [name for name in values if name not in cls.model_fields]:
            if name not in at_top:
                raise ValueError(_unknown_key(name, values, [*cls.model_fields, *at_top], at_top))
            if name in train:
                raise ValueError(f"{name} stands at the top of the recipe and under train: leave one of them out")
        under_train = set(train)
        train |= {name: values.pop(name) for name in at_top if name in values}
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
            outside = {"output_dir", *at_top} - under_train
            lines = [_place_fault(line, config, outside) for line in str(error).splitlines()]
            raise ConfigError("\n".join(lines)) from None
        return values

    @model_validator(mode="after")
    def _rewards_fit_algorithm(self) -> "Recipe":
        if self.train.rewards == "required" and not self.rewards:
            raise ValueError(f"algorithm {self.algorithm!r} needs at least one reward; `rlqwen rewards` lists them")
        if self.train.rewards == "refused" and self.rewards:
            raise ValueError(f"algorithm {self.algorithm!r} takes no rewards")
        return self


def _config_class(algorithm: Any) -> type[TrainerConfig]:
    if not isinstance(algorithm, str):
        names = ", ".join(TRAINERS.discover())
        raise ValueError(f"algorithm: must be a name, such as {names} (value given: {quoted(algorithm)})")
    try:
        return config_class(algorithm)
    except ConfigError as error:
        raise ConfigError(f"algorithm: {error}") from error


def _place_fault(fault: str, config: type[TrainerConfig], outside: set[str]) -> str:
    """Name a fault of the trainer's config by its key in the recipe: `epsilon: ...` is `train.epsilon: ...` there."""
    key = fault.partition(":")[0].partition(".")[0]
    if key in outside:
        return fault
    return f"train.{fault}" if key in config.model_fields else f"train: {fault}"


def _unknown_key(name: str, values: dict[str, Any], known: list[str], at_top: list[str]) -> str:
    """Explain a key at the top of a recipe that is neither the recipe's own nor a section of its algorithm."""
    algorithm, value = values["algorithm"], values[name]
    users = [other for other in TRAINERS.discover() if name in _sections_or_none(other)]
    if users:
        return (
            f"{name!r} has no meaning for algorithm {algorithm!r}: it is a section of {', '.join(users)}, and the "
            f"sections of {algorithm!r} are {', '.join(at_top)} (value given: {quoted(value)})"
        )
    hint = f"did you mean {near!r}?" if (near := nearest(name, known)) else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {name!r}; {hint} (value given: {quoted(value)})"


def _sections_or_none(algorithm: str) -> list[str]:
    """Return the sections of a registered algorithm; none if its package cannot be imported."""
    try:
        return Recipe.sections_of(config_class(algorithm))
    except ConfigError:
        return []
