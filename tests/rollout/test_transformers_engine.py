"""Test sampling in the trainer's process: seeds, logprobs, stopping, and the choice of the engine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlqwen.config import RolloutConfig
from rlqwen.errors import ConfigError, ResourceError
from rlqwen.rollout import build_engine
from rlqwen.rollout.engines import vllm
from rlqwen.rollout.engines.transformers import TransformersEngine
from rlqwen.types import Group, GroupRequest, Prompt, Sampling


class ModelHolder:
    """Replace the policy with the only attribute that the engine uses."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @contextlib.contextmanager
    def generation_model(self) -> Iterator[PreTrainedModel]:
        with torch.no_grad():
            yield self.model


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def start(model: PreTrainedModel, tiny_model_path: Path, max_num_seqs: int = 64) -> TransformersEngine:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    return TransformersEngine(ModelHolder(model), tokenizer, max_model_length=64, max_num_seqs=max_num_seqs)


def requests(count: int = 5, **sampling: Any) -> list[GroupRequest]:
    defaults: dict[str, Any] = {"max_tokens": 10}
    drawn = Sampling(**defaults | sampling)
    return [
        GroupRequest(
            Prompt(index, list(range(5, 8 + 2 * index)), ""), tuple(range(100 * index, 100 * index + 4)), drawn
        )
        for index in range(count)
    ]


def by_prompt(groups: list[Group]) -> dict[int, list[list[int]]]:
    assert len({group.prompt.index for group in groups}) == len(groups)
    return {group.prompt.index: [completion.token_ids for completion in group.completions] for group in groups}


def test_a_completion_depends_only_on_its_seed(model: PreTrainedModel, tiny_model_path: Path) -> None:
    together = by_prompt(list(start(model, tiny_model_path).generate(requests())))
    one_by_one = by_prompt(list(start(model, tiny_model_path, max_num_seqs=1).generate(requests())))
    assert together == one_by_one
    assert len({tuple(ids) for group in together.values() for ids in group}) == 20


def test_logprobs_are_those_of_the_processed_distribution(model: PreTrainedModel, tiny_model_path: Path) -> None:
    groups = list(start(model, tiny_model_path).generate(requests(temperature=0.5, top_k=3)))
    for group in groups:
        for completion in group.completions:
            tokens = group.prompt.token_ids + completion.token_ids
            with torch.no_grad():
                logits_TV = model(torch.tensor([tokens])).logits[0, len(group.prompt.token_ids) - 1 : -1] / 0.5
            kept_TV = torch.full_like(logits_TV, -torch.inf)
            top = logits_TV.topk(3, dim=-1)
            kept_TV.scatter_(1, top.indices, top.values)
            expected = kept_TV.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_samples_follow_the_distribution(model: PreTrainedModel, tiny_model_path: Path) -> None:
    """Compare the first tokens of 4,000 completions of one prompt with the model's probabilities."""
    count = 4000
    request = GroupRequest(Prompt(0, [5, 6, 7], ""), tuple(range(count)), Sampling(1, temperature=0.5))
    (group,) = start(model, tiny_model_path).generate([request])
    with torch.no_grad():
        p_V = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5).softmax(-1)
    drawn = torch.tensor([completion.token_ids[0] for completion in group.completions])
    share_V = drawn.bincount(minlength=len(p_V)) / count
    likely = p_V > 0.01
    assert likely.sum() > 3
    # Five standard errors of a binomial proportion.
    assert ((share_V - p_V).abs() < 5 * (p_V * (1 - p_V) / count).sqrt())[likely].all()


def test_stop_tokens_end_a_completion_and_belong_to_it(model: PreTrainedModel, tiny_model_path: Path) -> None:
    stop = set(range(60))
    reasons = set()
    # The generation defaults of the model are ignored.
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.eos_token_id = list(range(60, 200))
    groups = list(start(model, tiny_model_path).generate(requests(stop_token_ids=tuple(stop))))
    assert model.generation_config.repetition_penalty == 50.0
    for group in groups:
        for completion in group.completions:
            reasons.add(completion.finish_reason)
            assert not set(completion.token_ids[:-1]) & stop
            assert (completion.token_ids[-1] in stop) == (completion.finish_reason == "stop")
            assert len(completion.logprobs) == len(completion.token_ids)
    assert reasons == {"stop", "length"}


def test_completions_have_the_weight_version(model: PreTrainedModel, tiny_model_path: Path) -> None:
    sampler = start(model, tiny_model_path)
    sampler.load_weights(7, [], None)
    assert [group.policy_version for group in sampler.generate(requests(1))] == [7]


def test_a_prompt_that_fills_the_context_is_refused(model: PreTrainedModel, tiny_model_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt 3 has 64 tokens"):
        list(start(model, tiny_model_path).generate([GroupRequest(Prompt(3, [5] * 64, ""), (1,), Sampling(4))]))


def build(config: RolloutConfig, model: PreTrainedModel, folder: Path) -> object:
    return build_engine(
        config,
        model_path=str(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        policy=ModelHolder(model),
        compute_dtype="float32",
        max_model_length=64,
        seed=0,
    )


def test_without_vllm_the_transformers_engine_is_used_with_a_warning(
    model: PreTrainedModel, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: None if name == "vllm" else object())
    with pytest.warns(UserWarning, match="vllm can't be imported"):
        assert isinstance(build(RolloutConfig(), model, tiny_model_path), TransformersEngine)
    with pytest.raises(ResourceError, match="vllm can't be imported: pip install"):
        build(RolloutConfig(engine="vllm"), model, tiny_model_path)
