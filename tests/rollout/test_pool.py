"""Test the rollout pool with real Ray and vLLM workers: sampling, weight sync, dead workers and error messages."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlqwen.config import RolloutConfig
from rlqwen.data.control_tokens import CompletionReader
from rlqwen.errors import ConfigError, ResourceError, RolloutError, WeightSyncError, WorkerDied
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.rollout import build_engine
from rlqwen.rollout.actors import ActorHandle
from rlqwen.rollout.pool import RolloutPool
from rlqwen.types import Canary, Group, GroupRequest, Prompt, Sampling
from tests.patience import wait_until
from tests.rollout.test_transformers_shaping import (
    SHAPED,
    asked,
    assert_shaped,
    assert_stopped,
    sampling_by,
    text_of_two,
)

NUM_PROMPTS, NUM_GENERATIONS, MAX_TOKENS = 32, 8, 12
SMALL = {"hidden_size": 64, "num_layers": 2, "intermediate_size": 128, "num_heads": 2, "num_kv_heads": 1}
TEMPERATURE = 0.7


def start(
    folder: Path,
    *,
    lora_rank: int | None = None,
    reads_text: bool = False,
    max_model_length: int = 64,
    **config: object,
) -> RolloutPool:
    settings = {"engine": "vllm", "num_cpus_per_worker": 0.5, "max_num_seqs": 64, "max_restarts": 20} | config
    engine = build_engine(
        RolloutConfig(**settings),
        model_path=str(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        compute_dtype="float32",
        max_model_length=max_model_length,
        seed=0,
        lora_rank=lora_rank,
        reads_text=reads_text,
    )
    assert isinstance(engine, RolloutPool)
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide weights, so that the distribution is far from uniform.
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "tied", initializer_range=0.15, **SMALL)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[RolloutPool]:
    engine = start(folder, num_workers=2, reads_text=True)
    yield engine
    workers = engine.process_ids()
    engine.close()
    engine.close()
    for pid in workers:
        wait_for_end(pid)


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompts(count: int = NUM_PROMPTS) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(index, torch.randint(0, 256, (3 + index % 20,), generator=generator).tolist(), "")
        for index in range(count)
    ]


def requests(*, count: int = NUM_PROMPTS, **sampling: Any) -> list[GroupRequest]:
    drawn = Sampling(**{"max_tokens": MAX_TOKENS, "temperature": TEMPERATURE} | sampling)
    return [
        GroupRequest(prompt, tuple(1000 * prompt.index + sample for sample in range(NUM_GENERATIONS)), drawn)
        for prompt in prompts(count)
    ]


def token_ids(groups: list[Group]) -> dict[tuple[int, int], list[int]]:
    return {
        (group.prompt.index, place): completion.token_ids
        for group in groups
        for place, completion in enumerate(group.completions)
    }


def share_identical(ours: list[Group], theirs: list[Group]) -> float:
    first, second = token_ids(ours), token_ids(theirs)
    assert first.keys() == second.keys()
    return sum(first[key] == second[key] for key in first) / len(first)


def perturbed(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


@torch.no_grad()
def logprobs(model: PreTrainedModel, tokens: list[int], temperature: float = 1.0) -> Tensor:
    logits = model(torch.tensor([tokens])).logits[0, :-1].float() / temperature
    logp: Tensor = logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1)
    return logp


def canary(model: PreTrainedModel, offset: float = 0.0) -> Canary:
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(9)).tolist()
    return Canary(tuple(tokens), tuple((logprobs(model, tokens) + offset).tolist()), tolerance=1e-3)


def assert_drawn_from(groups: list[Group], model: PreTrainedModel) -> None:
    """Assert that the sampler's logprobs equal those of the transformers model after temperature."""
    for group in groups[:4]:
        for completion in group.completions:
            tokens = group.prompt.token_ids + completion.token_ids
            expected = logprobs(model, tokens, TEMPERATURE)[len(group.prompt.token_ids) - 1 :]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)


def test_a_sync_reaches_every_worker(pool: RolloutPool, model: PreTrainedModel) -> None:
    before = list(pool.generate(requests()))
    for version in (101, 102):
        metrics = pool.load_weights(version, perturbed(model, version).items(), canary(model))
        assert metrics["sync/canary_gap"] < 1e-4
        assert metrics["sync/rebuilt_engines"] == 0
        # Float32, with the tied head sent once.
        assert metrics["sync/bytes"] == 4 * sum(parameter.numel() for parameter in model.parameters())
        after = list(pool.generate(requests()))
        assert {group.policy_version for group in after} == {version} == {pool.version}
        assert_drawn_from(after, model)
        assert share_identical(before, after) < 0.5
        before = after


def test_weights_arrive_in_several_buckets(
    pool: RolloutPool, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer may lie in two buckets, and the tied head is another name of an embedding that came before."""
    monkeypatch.setattr("rlqwen.rollout.weight_sync.CHUNK_BYTES", 30_000)
    metrics = pool.load_weights(110, perturbed(model, 110).items(), canary(model))
    assert pool._bundle is not None
    assert len(pool._bundle.chunks) > 5
    assert metrics["sync/canary_gap"] < 1e-4
    assert metrics["sync/rebuilt_engines"] == 0


@pytest.mark.parametrize("options", SHAPED, ids=str)
def test_logprobs_are_those_of_the_sampling_distribution(
    pool: RolloutPool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    """Check that logprobs are those of the distribution from which the transformers engine samples."""
    pool.load_weights(pool.version + 1, model.state_dict().items(), canary(model))
    sampling = sampling_by(options, tokenizer)
    assert_shaped(list(pool.generate(asked(sampling))), model, tokenizer, sampling)


def test_a_stop_string_ends_a_completion(pool: RolloutPool, tokenizer: PreTrainedTokenizerBase) -> None:
    stop = text_of_two(list(pool.generate(asked(Sampling(10)))), tokenizer)
    assert_stopped(list(pool.generate(asked(Sampling(10, stop=("never written", stop))))), tokenizer, stop)


@pytest.mark.fault("many groups, dealt to two workers", "each comes exactly once")
def test_every_group_arrives_once_with_text_and_finish_reason(
    pool: RolloutPool, tokenizer: PreTrainedTokenizerBase
) -> None:
    stop = tuple(range(60))
    asked = requests(stop_token_ids=stop)
    groups = list(pool.generate(asked))
    assert sorted(group.prompt.index for group in groups) == list(range(NUM_PROMPTS))
    # The request's own prompt object comes back.
    assert {id(group.prompt) for group in groups} == {id(request.prompt) for request in asked}
    reasons = set()
    for group in groups:
        assert len(group) == NUM_GENERATIONS
        for completion in group.completions:
            reasons.add(completion.finish_reason)
            assert len(completion.logprobs) == len(completion.token_ids) <= MAX_TOKENS
            assert not set(completion.token_ids[:-1]) & set(stop)
            assert (completion.token_ids[-1] in stop) == (completion.finish_reason == "stop")
            assert [completion.text] == CompletionReader(tokenizer).texts([completion.token_ids])
    assert reasons == {"stop", "length"}


def test_logprobs_are_those_of_the_truncated_distribution(pool: RolloutPool) -> None:
    """With top_k=1 the only remaining token has probability 1, so its logprob is 0."""
    groups = list(pool.generate(requests(count=2, top_k=1)))
    assert all(logp == 0.0 for group in groups for completion in group.completions for logp in completion.logprobs)
    assert all(len({tuple(completion.token_ids) for completion in group.completions}) == 1 for group in groups)


@pytest.mark.fault(
    "SIGKILL of a rollout worker in the middle of sampling", "replaced, its groups drawn again from the same seeds"
)
def test_a_killed_worker_is_replaced_and_its_groups_are_sampled_again(
    pool: RolloutPool, model: PreTrainedModel
) -> None:
    """With the other worker dead, one worker samples the same completions as two did, from the same seeds."""
    pool.load_weights(201, perturbed(model, 201).items(), canary(model))
    two_workers = list(pool.generate(requests()))
    victim = pool.process_ids()[0]
    restarts = pool.num_restarts
    stream = pool.generate(requests())
    groups = [next(stream)]
    os.kill(victim, signal.SIGKILL)
    groups += list(stream)
    assert pool.num_restarts == restarts + 1
    assert len(groups) == NUM_PROMPTS
    assert share_identical(two_workers, groups) == 1.0

    pool.wait_until_ready()
    assert victim not in pool.process_ids()
    again = list(pool.generate(requests()))
    assert {group.policy_version for group in again} == {201}
    assert_drawn_from(again, model)
    # Batches differ between runs, so the order of sums differs, which could change the result of a near tie.
    assert share_identical(two_workers, again) >= 0.99


@pytest.mark.fault("SIGSTOP of a rollout worker", "replaced after its deadline, each group once")
def test_a_stuck_worker_is_replaced_after_its_deadline(pool: RolloutPool, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = pool.process_ids()[1]
    os.kill(victim, signal.SIGSTOP)
    monkeypatch.setattr(pool.config, "generate_timeout", 10.0)
    restarts = pool.num_restarts
    groups = list(pool.generate(requests()))
    assert sorted(group.prompt.index for group in groups) == list(range(NUM_PROMPTS))
    assert pool.num_restarts == restarts + 1
    wait_for_end(victim)
    pool.wait_until_ready()


def wait_for_end(pid: int) -> None:
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"process {pid} has ended")


@pytest.mark.fault("the same groups drawn twice, dealt to two workers as they come free", "equal to the bit")
def test_the_same_seeds_give_bit_identical_completions(pool: RolloutPool, model: PreTrainedModel) -> None:
    """Exact resume needs this: neither the worker nor the other requests of a batch may change any bit of a group."""
    pool.load_weights(150, perturbed(model, 150).items(), canary(model))
    draws = [sorted(pool.generate(requests()), key=lambda group: group.prompt.index) for _ in range(2)]
    first, again = ([(c.token_ids, c.logprobs) for group in draw for c in group.completions] for draw in draws)
    assert first == again


def test_groups_are_assigned_to_workers_in_fixed_blocks(
    pool: RolloutPool, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are assigned by index in blocks; groups of a dead worker are sampled again after it is replaced."""
    monkeypatch.setattr(pool.config, "deterministic", True)
    monkeypatch.setattr("rlqwen.rollout.dispatch.MAX_SHARE", 12)
    pool.load_weights(155, perturbed(model, 155).items(), canary(model))
    asked = requests()
    dealt: list[tuple[int, Any]] = []
    hand = pool._dispatch._hand

    def noted_hand(actor: ActorHandle, *rest: Any) -> None:
        dealt.append((actor.index, rest))
        hand(actor, *rest)

    monkeypatch.setattr(pool._dispatch, "_hand", noted_hand)
    whole = list(pool.generate(asked))
    assert [(slot, job[0].prompt.index) for slot, job in dealt] == [
        *((0, index) for index in range(0, 24, 2)), *((1, index) for index in range(1, 24, 2)),
        *((0, index) for index in range(24, 32, 2)), *((1, index) for index in range(25, 32, 2)),
    ]  # fmt: skip
    assert [job[1].size for _, job in dealt] == [12] * 24 + [4] * 8
    stream = pool.generate(asked)
    groups = [next(stream)]
    os.kill(pool.process_ids()[1], signal.SIGKILL)
    groups += list(stream)
    assert sorted(group.prompt.index for group in groups) == list(range(NUM_PROMPTS))
    assert share_identical(whole, groups) == 1.0
    assert {group.policy_version for group in groups} == {155}


@pytest.mark.fault("a sync while prompts of old weights are in the prefix cache", "nothing of them is used again")
def test_a_sync_empties_the_prefix_cache(pool: RolloutPool, model: PreTrainedModel) -> None:
    long = Prompt(0, torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(3)).tolist(), "")
    request = GroupRequest(long, (1, 2), Sampling(8, temperature=TEMPERATURE))
    for version in (160, 161):
        pool.load_weights(version, perturbed(model, version).items(), canary(model))
        for _ in range(3):  # until both workers have cached it
            assert_drawn_from(list(pool.generate([request, request])), model)


@pytest.mark.fault("SIGKILL of a worker in the middle of a weight sync", "replaced, sent the new weights, never mixed")
def test_a_worker_killed_during_a_sync_is_replaced(pool: RolloutPool, model: PreTrainedModel) -> None:
    victim, restarts = pool.process_ids()[0], pool.num_restarts
    os.kill(victim, signal.SIGSTOP)  # it has received the weights but cannot load them
    killer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
    killer.start()
    pool.load_weights(170, perturbed(model, 170).items(), canary(model))
    killer.join()
    assert pool.num_restarts == restarts + 1
    groups = list(pool.generate(requests()))
    assert {group.policy_version for group in groups} == {170}
    assert_drawn_from(groups, model)


@pytest.mark.fault("sampling is given up in another thread", "it ends at once; the next draw gets its own groups")
def test_sampling_in_another_thread_can_be_cancelled(pool: RolloutPool) -> None:
    with ThreadPoolExecutor(1) as thread:
        drawing = thread.submit(lambda: list(pool.generate(requests(max_tokens=30) * 20)))
        while not drawing.done():  # a cancel before sampling starts has no effect
            time.sleep(0.2)
            pool.cancel()
        with pytest.raises(RolloutError, match="dropped"):
            drawing.result()
    assert len(list(pool.generate(requests(count=2)))) == 2


@pytest.mark.fault("groups that come late, after their draw was given up", "none of them; those of the next, once each")
def test_dropping_the_iterator_cancels_its_requests(pool: RolloutPool) -> None:
    abandoned = pool.generate(requests())
    next(abandoned)
    groups = list(pool.generate(requests(count=3)))
    assert sorted(group.prompt.index for group in groups) == [0, 1, 2]
    with pytest.raises(RolloutError, match="dropped by a later"):
        next(abandoned)


@pytest.mark.fault("a tensor of a sync missing, misshapen or misnamed", "refused by name before a worker sees it")
def test_wrong_weights_raise_an_error_with_their_names(pool: RolloutPool, model: PreTrainedModel) -> None:
    pool.load_weights(301, model.state_dict().items(), canary(model))
    weights = model.state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    renamed = {key.replace(name, "mlp.wrong"): value for key, value in weights.items()}
    with pytest.raises(WeightSyncError, match=rf"missing: {name}; unknown: mlp.wrong"):
        pool.load_weights(302, renamed.items(), canary(model))
    with pytest.raises(WeightSyncError, match=rf"{name} is \[2, 2\], not \[128, 64\]"):
        pool.load_weights(302, (weights | {name: torch.zeros(2, 2)}).items(), canary(model))
    with pytest.raises(RolloutError, match="no worker may serve"):
        list(pool.generate(requests(count=1)))
    pool.load_weights(303, weights.items(), canary(model))
    assert {group.policy_version for group in pool.generate(requests(count=2))} == {303}


@pytest.mark.fault("weights that give a worker other logprobs than the trainer's", "the canary stops all sampling")
def test_a_failed_weight_sync_check_stops_all_sampling(pool: RolloutPool, model: PreTrainedModel) -> None:
    pool.load_weights(401, model.state_dict().items(), canary(model))
    with pytest.raises(WeightSyncError, match=r"rollout worker \d .*version 402.* by 0\.05.*tolerance 0\.001"):
        pool.load_weights(402, model.state_dict().items(), canary(model, offset=0.05))
    with pytest.raises(RolloutError, match="no worker may serve"):
        list(pool.generate(requests(count=1)))
    with pytest.raises(WeightSyncError, match="by nan"):
        pool.load_weights(403, model.state_dict().items(), canary(model, offset=float("nan")))
    metrics = pool.load_weights(404, model.state_dict().items(), canary(model))
    assert metrics["sync/canary_gap"] < 1e-4
    assert_drawn_from(list(pool.generate(requests(count=4))), model)


def test_an_untied_head_is_synced(tmp_path: Path) -> None:
    folder = build_tiny_qwen3(tmp_path / "untied", tie_word_embeddings=False, initializer_range=0.15, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pool = start(folder)
    try:
        assert_drawn_from(list(pool.generate(requests(count=4))), model)
        metrics = pool.load_weights(1, perturbed(model, 1).items(), canary(model))
        assert metrics["sync/canary_gap"] < 1e-4
        assert_drawn_from(list(pool.generate(requests(count=4))), model)
    finally:
        pool.close()


def test_a_prompt_that_fills_the_context_is_refused(pool: RolloutPool) -> None:
    prompt = Prompt(7, [5] * 64, "")
    with pytest.raises(ConfigError, match=r"prompt 7 has 64 tokens.*context of 64"):
        list(pool.generate([GroupRequest(prompt, (1,), Sampling(4))]))


def test_requesting_more_than_ray_has_is_refused(pool: RolloutPool, folder: Path) -> None:
    with pytest.raises(ResourceError, match=r"workers x 0.5 CPUs = [\d.]+ CPUs, but there are"):
        start(folder, num_workers=1000)
    pool.process_ids()


@pytest.mark.fault("all rollout workers die again and again", "one error after max_restarts")
def test_too_many_dead_workers_stop_the_run(pool: RolloutPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.config, "max_restarts", pool.num_restarts)
    stream = pool.generate(requests())
    next(stream)
    os.kill(pool.process_ids()[0], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"rollout\.max_restarts is \d+\. The last: rollout worker \d \(process \d+\)"):
        list(stream)
