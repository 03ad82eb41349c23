"""Define what `generation_kwargs` may hold: vLLM's sampling parameters by their names, which both engines apply."""

import json
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from rlqwen.config.base import ArgumentsConfig

# Names of the same settings in transformers' GenerationConfig.
_TRANSFORMERS_NAMES = {"stop_strings": "stop", "eos_token_id": "stop_token_ids", "min_new_tokens": "min_tokens"}

# Settings that always hold here, and may be given.
_AS_ALWAYS: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1, None), "num_beams": (1,), "num_return_sequences": (1,), "do_sample": (True,),
    "use_cache": (True,), "detokenize": (True,), "skip_special_tokens": (True,), "ignore_eos": (False,),
    "include_stop_str_in_output": (True,), "seed": (None,), "logprobs": (None,), "prompt_logprobs": (None,),
    "structured_outputs": (None,), "cache_implementation": (None,), "no_repeat_ngram_size": (0,),
}  # fmt: skip

_SEEDS = "leave it out: seeds derive from train.seed, the step, the prompt and the sample"
_LOGPROBS = "leave it out: rollouts ask for the logprobs that training needs"
_GROUPS = "set train.num_generations"

OF_THE_CONFIG = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_tokens": "max_completion_length",
    "max_new_tokens": "max_completion_length",
}  # fmt: skip
"""Keys of generation_kwargs that are fields of the trainer's config -> those fields."""


class GenerationKwargs(ArgumentsConfig):
    """Sampling parameters that are not fields of the trainer's config."""

    refused: ClassVar[dict[str, str]] = {
        "n": _GROUPS, "best_of": _GROUPS, "num_return_sequences": _GROUPS, "seed": _SEEDS, "logprobs": _LOGPROBS,
        "prompt_logprobs": _LOGPROBS,
        "do_sample": "completions are sampled; a low temperature comes near to greedy decoding",
        "num_beams": "completions are sampled, one by one",
        "ignore_eos": "completions end at the end of turn; to make them longer, set min_tokens",
        "skip_special_tokens": "rewards read the text without special tokens; give them completion_ids for the tokens",
        "include_stop_str_in_output": "the text that rewards read is that of the tokens that are trained, the stop text "
        "included; cut it off in the reward",
        "structured_outputs": "constrained decoding is not supported; reward the format, or use logit_bias or "
        "allowed_token_ids",
        "guided_decoding": "constrained decoding is not supported; reward the format, or use logit_bias or "
        "allowed_token_ids",
        "no_repeat_ngram_size": "use presence_penalty, frequency_penalty or repetition_penalty",
        "suppress_tokens": "use logit_bias, with -100 for each of them",
        "bad_words_ids": "use bad_words, which takes text",
        "sequence_bias": "use logit_bias or bad_words",
        "max_length": "set train.max_completion_length",
        "logits_processor": "use logit_bias, bad_words or allowed_token_ids",
        "logits_processors": "use logit_bias, bad_words or allowed_token_ids",
    }  # fmt: skip

    stop: list[str] = Field(default_factory=list)
    """Texts that end a completion. It then counts as finished, not truncated, and keeps the whole token that completes
    the text."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Tokens that end a completion, besides the end of turn and the EOS token."""
    min_tokens: int = Field(default=0, ge=0)
    """Fewest tokens of a completion; nothing ends it earlier."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logit of every token that the completion already has."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from a token's logit once per occurrence in the completion."""
    bad_words: list[str] = Field(default_factory=list)
    """Texts that are never generated."""
    logit_bias: dict[int, float] = Field(default_factory=dict)
    """Token id -> what is added to its logit."""
    allowed_token_ids: list[int] = Field(default_factory=list)
    """The only tokens that may be generated. Empty: all."""

    @model_validator(mode="before")
    @classmethod
    def _accept_other_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if value not in _AS_ALWAYS.get(key, ())}
        for theirs, ours in _TRANSFORMERS_NAMES.items():
            if theirs in values:
                values.setdefault(ours, values.pop(theirs))
        return values

    @field_validator("stop", "stop_token_ids", "bad_words", "allowed_token_ids", mode="before")
    @classmethod
    def _accept_one(cls, value: Any) -> Any:
        """Accept one text or id instead of a list, and None as nothing."""
        return [value] if isinstance(value, str | int) else [] if value is None else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _accept_no_bias(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _no_empty_texts(self) -> "GenerationKwargs":
        for key in ("stop", "bad_words"):
            if "" in getattr(self, key):
                raise ValueError(f"{key} holds an empty text, which would be found everywhere: take it out")
        return self


def read_generation_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    """Move values of `generation_kwargs` that have a field of their own into that field, as TRL does.

    Raises ValueError if the two contradict each other.
    """
    given = values.get("generation_kwargs")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"generation_kwargs is text, but not a JSON object: {error}") from None
    if given is None or not isinstance(given, dict):
        return {key: value for key, value in values.items() if key != "generation_kwargs" or value is not None}
    given, values = dict(given), dict(values)
    for key in [key for key in given if key in OF_THE_CONFIG]:
        value, field = given.pop(key), OF_THE_CONFIG[key]
        if values.setdefault(field, value) != value:
            raise ValueError(
                f"generation_kwargs says {key}={value!r}, and {field} is {values[field]!r}: leave one of them out"
            )
    return values | {"generation_kwargs": given}
