"""Test sampling by TRL's and vLLM's names: what is accepted, mapped, or refused with an alternative."""

import dataclasses
from typing import Any

import pytest

from rlqwen import GRPOConfig, PPOConfig
from rlqwen.errors import ConfigError
from rlqwen.rollout.sampling_parameters import sampling_of
from rlqwen.types import Truncation


def test_generation_kwargs_reach_the_sampler() -> None:
    args = GRPOConfig(
        generation_kwargs={
            "stop": "</answer>", "stop_token_ids": [7, 3], "min_tokens": 2, "presence_penalty": 0.5,
            "frequency_penalty": 0.25, "bad_words": ["no"], "logit_bias": {"5": 1.5}, "allowed_token_ids": [1, 2, 3],
            "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 99, "n": 1, "skip_special_tokens": True,
        }
    )  # fmt: skip
    sampling = sampling_of(args, [3, 4])
    assert dataclasses.asdict(sampling) == {
        "max_tokens": 99, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "stop": ("</answer>",), "stop_token_ids": (3, 4, 7),
        "min_tokens": 2, "bad_words": ("no",), "logit_bias": ((5, 1.5),), "allowed_token_ids": (1, 2, 3),
    }  # fmt: skip
    assert (args.temperature, args.max_completion_length) == (0.6, 99)  # what training computes with


def test_generation_kwargs_accept_transformers_names_and_json_text() -> None:
    args = GRPOConfig(generation_kwargs='{"stop_strings": ["a", "b"], "eos_token_id": 9, "min_new_tokens": 1}')
    assert args.generation_kwargs.stop == ["a", "b"]
    assert args.generation_kwargs.stop_token_ids == [9]
    assert args.generation_kwargs.min_tokens == 1
    assert GRPOConfig(generation_kwargs=None, top_k=-1).top_k == 0
    assert GRPOConfig(**GRPOConfig(generation_kwargs={"stop": ["x"]}).model_dump()).generation_kwargs.stop == ["x"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_kwargs": {"n": 4}}, "generation_kwargs.*'n' has no meaning in rlqwen: set train.num_generations"),
        ({"generation_kwargs": {"seed": 3}}, "seeds derive from"),
        ({"generation_kwargs": {"stpo": ["x"]}}, "unknown key 'stpo'; did you mean 'stop'"),
        ({"generation_kwargs": {"include_stop_str_in_output": False}}, "cut it off in the reward"),
        ({"generation_kwargs": {"structured_outputs": {"regex": "a"}}}, "constrained decoding is not supported"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, "use presence_penalty"),
        ({"generation_kwargs": {"stop": [""]}}, "empty text"),
        ({"generation_kwargs": {"temperature": 0.5}, "temperature": 0.7}, "temperature=0.5, and temperature is 0.7"),
        ({"generation_kwargs": {"min_tokens": 600}}, "must not be above max_completion_length=512"),
        ({"generation_kwargs": "{"}, "not a JSON object"),
        ({"generation_kwargs": 3}, "generation_kwargs"),
        ({"vllm_mode": "server"}, "'vllm_mode' has no meaning in rlqwen: workers are Ray actors"),
        ({"vllm_model_impl": "transformers"}, "workers run vLLM's own models"),
        ({"vllm_server_timeout": 60}, r"rollout\.start_timeout"),
        ({"vllm_group_port": 1}, r"rollout\.weight_transfer"),
        ({"vllm_structured_outputs_regex": "a"}, "constrained decoding is not supported"),
        ({"use_transformers_continuous_batching": True}, "'engine': 'vllm'"),
        ({"cache_implementation": "static"}, "'engine': 'vllm'"),
        ({"vllm_importance_sampling_cap": 2, "vllm_importance_sampling_clip_max": 3}, "old name for"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "must be below vllm_importance_sampling_clip_max=3"),
        ({"rollout": {"max_staleness": 1}, "repetition_penalty": 1.1}, "repetition_penalty shapes the sampler's"),
    ],
)
def test_unsupported_generation_settings_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    for kind in (GRPOConfig, PPOConfig):
        with pytest.raises(ConfigError, match=message):
            kind(**options)


def test_trls_vllm_arguments_are_mapped_or_change_nothing() -> None:
    given: dict[str, Any] = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_model_impl": "vllm", "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": 1024, "vllm_tensor_parallel_size": 2, "vllm_enable_sleep_mode": False,
        "vllm_structured_outputs_regex": None, "vllm_server_base_url": None,
        "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_cap": 2.0, "cache_implementation": None,
        "use_transformers_continuous_batching": False, "ds3_gather_for_generation": True, "log_completions": True,
    }  # fmt: skip
    args = GRPOConfig(**given)
    rollout = args.rollout
    assert (rollout.engine, rollout.gpu_memory_utilization, rollout.max_model_length) == ("vllm", 0.3, 1024)
    assert (rollout.tensor_parallel_size, rollout.sleep) == (2, False)
    assert args.vllm_importance_sampling_clip_max == 2.0


def test_every_argument_of_trl_about_vllm_is_known() -> None:
    trl = pytest.importorskip("trl")
    for field in dataclasses.fields(trl.GRPOConfig):
        if "vllm" in field.name or field.name in ("generation_kwargs", "cache_implementation"):
            GRPOConfig(**{field.name: field.default})
            if field.name != "use_vllm":  # which takes what is true or false
                with pytest.raises(ConfigError) as caught:
                    GRPOConfig(**{field.name: object()})
                assert "unknown key" not in str(caught.value)


def test_settings_that_the_trainer_cannot_reproduce_turn_the_correction_off() -> None:
    assert GRPOConfig().truncation is None
    assert GRPOConfig(top_p=0.9, min_p=0.1).truncation == Truncation(top_p=0.9, min_p=0.1)
    assert GRPOConfig(top_k=5).uncomparable is None
    assert GRPOConfig(generation_kwargs={"stop": ["x"]}).uncomparable is None
    several = GRPOConfig(repetition_penalty=1.1, generation_kwargs={"min_tokens": 1, "stop": ["x"]}).uncomparable
    assert several is not None
    assert several.startswith("repetition_penalty and generation_kwargs.min_tokens shape the sampler's distribution")
