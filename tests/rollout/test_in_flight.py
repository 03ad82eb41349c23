"""Test weights that change while completions are in flight, with real Ray and vLLM workers."""

import copy
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlqwen import GRPOConfig, GRPOTrainer
from rlqwen.config import RolloutConfig
from rlqwen.errors import ConfigError, RolloutError, WeightSyncError
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.engine import engine_class
from rlqwen.rollout.policy_sync import choose_sync
from rlqwen.rollout.pool import RolloutPool
from rlqwen.rollout.prefetch import _completions_from_state, _versions_state
from rlqwen.rollout.turns import Turns
from rlqwen.rollout.weight_sync import WeightBundle
from rlqwen.types import Canary, Completion, Group, GroupRequest, Prompt, Sampling
from tests.patience import PATIENCE_S, wait_until
from tests.rollout.gated_engine import GATES, gate_file, hold_file, loading_file
from tests.rollout.test_pool import SMALL, TEMPERATURE, canary, perturbed, start
from tests.rollout.test_prefetch import Watch
from tests.rollout.test_vllm_lora import RSLORA, adapted

ENGINE = f"{Path(__file__).with_name('gated_engine.py')}:GatedVllm"
PLACES = 4
LONG = 200
"""Tokens of completions that are in flight at both updates."""
AFTER_FIRST = 60
"""Tokens of a completion that ends between them."""
SHORT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "tied", initializer_range=0.15, **SMALL)


def start_pool(folder: Path, **config: Any) -> RolloutPool:
    settings: dict[str, Any] = {"engine": ENGINE, "max_num_seqs": PLACES, "in_flight_updates": True, "max_staleness": 1}
    return start(folder, max_model_length=300, **settings | config)


def requests() -> list[GroupRequest]:
    """Return a group for each event, and short ones that wait for a place; all but the first two have the same prompt."""
    tokens = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(3)).tolist()
    lengths = [4, AFTER_FIRST, LONG, *[SHORT] * 8]
    return [
        GroupRequest(
            Prompt(index, tokens[: 5 + index] if index < 2 else tokens, ""),
            (2 * index, 2 * index + 1) if length == LONG else (2 * index,),
            Sampling(length, temperature=TEMPERATURE),
        )
        for index, length in enumerate(lengths)
    ]


class Carried:
    """Bring weights in the calls of vLLM's protocol, as transfers between GPUs do; nothing holds a copy."""

    needs_workers = True

    def publish(
        self, version: int, weights: Iterable[tuple[str, Tensor]], canary: Canary | None, handles: Sequence[Any]
    ) -> WeightBundle:
        names, tensors = zip(*weights, strict=True)
        info = {"update_info": {"names": list(names), "tensors": list(tensors)}}
        phases: Any = (
            ("init_weight_transfer_engine", {"init_info": {}}),
            ("start_weight_update", {}),
            ("update_weights", info),
        )
        for phase, arguments in (*phases, ("finish_weight_update", {})):
            for handle in handles:
                cluster.wait([answer := handle.transfer.remote(phase, arguments)], timeout_s=PATIENCE_S)
                assert cluster.answer(answer) is None
        return WeightBundle(version, (), {}, canary, 0)

    def resend(self, handle: Any) -> None:
        raise NotImplementedError


@torch.no_grad()
def mixed_logprobs(models: Sequence[PreTrainedModel], prompt: list[int], completion: Any) -> Tensor:
    """Return each token's logprob by the model that sampled it, on keys and values of the models before it."""
    tokens, start, cache, found = prompt + completion.token_ids, 0, None, []
    end = len(prompt) - 1
    for version, count in completion.weight_versions:
        end += count
        output = models[version](torch.tensor([tokens[start:end]]), past_key_values=cache, use_cache=True)
        logp = (output.logits[0].float() / TEMPERATURE).log_softmax(-1)
        found.append(logp.gather(-1, torch.tensor(tokens[start + 1 : end + 1])[:, None])[-count:, 0])
        cache, start = output.past_key_values, end
    return torch.cat(found)


def assert_sampled_as_it_says(groups: list[Group], models: Sequence[PreTrainedModel]) -> None:
    for group in groups:
        for completion in group.completions:
            versions = [version for version, _ in completion.weight_versions or ()]
            assert versions == sorted(set(versions))
            assert sum(count for _, count in completion.weight_versions or ()) == len(completion.token_ids)
            expected = mixed_logprobs(models, group.prompt.token_ids, completion)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)
        assert group.policy_version == min((c.weight_versions or [])[0][0] for c in group.completions)


def sample_and_update(pool: RolloutPool, updates: Sequence[Callable[[], dict[str, float]]]) -> tuple[list[Group], Any]:
    """Sample in a thread, and make an update in this one after each of the first groups; return groups and metrics."""
    groups: list[Group] = []
    arrived = [threading.Event() for _ in updates]

    def sample() -> None:
        for group in pool.generate(requests()):
            groups.append(group)
            if group.prompt.index < len(arrived):
                arrived[group.prompt.index].set()

    with ThreadPoolExecutor(1) as thread:
        sampling = thread.submit(sample)
        metrics = []
        try:
            for event, update in zip(arrived, updates, strict=True):
                assert event.wait(PATIENCE_S)
                metrics.append(update())
            sampling.result(PATIENCE_S)
        finally:
            pool.cancel()  # so that the other thread ends too
    return groups, metrics


def check(groups: list[Group], metrics: list[dict[str, float]], models: Sequence[PreTrainedModel]) -> None:
    asked = requests()
    assert sorted(group.prompt.index for group in groups) == list(range(len(asked)))
    by_index = {group.prompt.index: group for group in groups}
    for request in asked:
        completions = by_index[request.prompt.index].completions
        assert [len(c.token_ids) for c in completions] == [request.sampling.max_tokens] * len(request.seeds)
    for one in metrics:
        assert one["sync/canary_gap"] < 1e-4
        assert one["sync/rebuilt_engines"] == 0
    # The group that ended has one completion of 12.
    assert metrics[0]["sync/kept_completions"] == 11
    assert_sampled_as_it_says(groups, models)
    for long in by_index[2].completions:
        (first, before), (second, between), (third, after) = long.weight_versions or []
        assert (first, second, third) == (0, 1, 2)
        assert 4 <= before <= GATES[0]
        assert AFTER_FIRST - GATES[0] <= between <= GATES[1] - 4
        # The check would notice if vLLM had computed old keys and values anew.
        tokens = by_index[2].prompt.token_ids + long.token_ids
        with torch.no_grad():
            logp = (models[2](torch.tensor([tokens])).logits[0, :-1].float() / TEMPERATURE).log_softmax(-1)
        anew = logp.gather(-1, torch.tensor(tokens[1:])[:, None])[-after:, 0]
        assert (anew - torch.tensor(long.logprobs[-after:])).abs().max() > 0.05
    # Those that waited began with the weights of their time, although blocks of the same prompt were cached.
    begun = [group.policy_version for group in groups if group.prompt.index > 2]
    assert set(begun) == {0, 1, 2}


@pytest.mark.fault(
    "weights change while completions are in flight", "none is lost or begun anew, and each token names its weights"
)
def test_completions_go_on_with_new_weights(folder: Path) -> None:
    """Send one update through the store and one in the calls of a transfer."""
    first = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    models = [first, *(copy.deepcopy(first) for _ in range(2))]
    weights = [perturbed(model, seed) for seed, model in enumerate(models) if seed]
    pool = start_pool(folder)
    try:
        stored = pool._delivery

        def carry() -> dict[str, float]:
            pool._delivery = Carried()
            return pool.load_weights(2, weights[1].items(), canary(models[2]))

        by_store = lambda: pool.load_weights(1, weights[0].items(), canary(models[1]))
        groups, metrics = sample_and_update(pool, [by_store, carry])
        check(groups, metrics, models)
        pool._delivery = stored
        assert_ends_both_threads(pool, weights[0], canary(models[1], offset=0.05))
    finally:
        pool.close()


@pytest.mark.fault(
    "SIGKILL of a worker while it loads weights in flight (rollout.in_flight_updates)",
    "replaced; the new one gets the new weights, and samples every group in flight again from them",
)
def test_a_worker_that_dies_in_an_update_is_replaced(tmp_path: Path) -> None:
    length, count = AFTER_FIRST, 3  # all in flight at the first gate
    folder = build_tiny_qwen3(tmp_path / "model", initializer_range=0.15, **SMALL)
    first = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    models = [first, *(copy.deepcopy(first) for _ in range(2))]
    weights = [perturbed(model, seed) for seed, model in enumerate(models) if seed]
    asked = [
        GroupRequest(Prompt(i, [7, 8, i], ""), (i,), Sampling(length, temperature=TEMPERATURE)) for i in range(count)
    ]
    pool = start_pool(folder)
    try:
        (victim,) = pool.process_ids()
        with ThreadPoolExecutor(2) as thread:
            sampling = thread.submit(lambda: list(pool.generate(asked)))
            wait_until(gate_file(folder, GATES[0]).exists, "the engine waits at the gate")
            hold_file(folder).touch()
            update = thread.submit(lambda: pool.load_weights(1, weights[0].items(), canary(models[1])))
            wait_until(loading_file(folder).exists, "the worker is told to load")
            os.kill(victim, signal.SIGKILL)
            hold_file(folder).unlink()
            try:
                metrics, groups = update.result(PATIENCE_S), sampling.result(PATIENCE_S)
            finally:
                pool.cancel()  # so that the other thread ends too
        assert metrics["rollout/restarts"] == 1
        assert metrics["sync/kept_completions"] == count
        assert metrics["sync/canary_gap"] < 1e-4
        assert sorted(group.prompt.index for group in groups) == list(range(count))
        assert [each.weight_versions for group in groups for each in group.completions] == [[(1, length)]] * count
        assert_sampled_as_it_says(groups, models)
        assert pool.load_weights(2, weights[1].items(), canary(models[2]))["sync/canary_gap"] < 1e-4
        again = list(pool.generate(asked))
        assert {group.policy_version for group in again} == {2}
        assert_sampled_as_it_says(again, models)
    finally:
        pool.close()


def assert_ends_both_threads(pool: RolloutPool, weights: dict[str, Tensor], wrong: Canary) -> None:
    """Send weights whose canary is off even in a new engine."""
    with ThreadPoolExecutor(1) as thread:
        begun = threading.Event()

        def sample() -> None:
            for _ in pool.generate(requests()):
                begun.set()

        sampling = thread.submit(sample)
        assert begun.wait(PATIENCE_S)
        with pytest.raises(WeightSyncError, match=r"by 0\.05.* even in an engine built anew"):
            pool.load_weights(3, weights.items(), wrong)
        with pytest.raises(RolloutError, match=r"the last weight sync failed: .* even in an engine built anew"):
            sampling.result(PATIENCE_S)


def test_an_adapter_is_merged_into_the_weights(folder: Path) -> None:
    """vLLM gives a request its adapter when it begins, so weights with the adapter merged are sent instead."""
    policy = adapted(folder, 0, **RSLORA)
    rank, note = choose_sync(policy, RolloutConfig(num_gpus_per_worker=1, max_staleness=1, in_flight_updates=True))
    assert rank is None
    assert "the adapter merged: with rollout.in_flight_updates" in (note or "")
    with pytest.raises(ConfigError, match=r"lora is true, but .* keep the adapter they began with; leave rollout.lora"):
        choose_sync(policy, RolloutConfig(lora=True, max_staleness=1, in_flight_updates=True))


def prefers_even(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


@pytest.mark.parametrize("arrival", [False, True])
def test_a_run_sends_weights_in_flight_and_counts_tokens_by_age(folder: Path, tmp_path: Path, arrival: bool) -> None:
    """The second step's groups are at half of their length, before a gate, when the first step's update comes."""
    length, middle = 80, GATES[1] - 80
    args = GRPOConfig(
        output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_completion_length=length,
        max_steps=3, learning_rate=1e-3, save_strategy="no", train_on_arrival=arrival, scoring={"in_process": ["prefers_even"]},
        rollout={"engine": ENGINE, "max_num_seqs": 8, "num_cpus_per_worker": 0.5, "max_staleness": 1, "in_flight_updates": True},
    )  # fmt: skip
    rows = [{"prompt": f"{i} + 1 = ?"} for i in range(9)]
    trainer = GRPOTrainer(str(folder), prefers_even, args, rows)
    gate = gate_file(folder, GATES[1])
    gate.unlink(missing_ok=True)
    trainer.callbacks.append(Watch(lambda: wait_until(gate.exists, "the engine waits at the gate")))
    trainer.train()
    first, second, third = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "tokens/lag_1" not in first
    for step in (first, second, third):
        assert sum(count for key, count in step.items() if key.startswith("tokens/lag_")) == step["tokens/generated"]
        assert step["sync/canary_gap"] < 1e-3
    completions = read_rows(tmp_path / "completions" / "step-000002.jsonl")
    assert second["sync/kept_completions"] == 8  # of both groups, as far as the pool knows
    assert sum(row["num_tokens"] > middle for row in completions) > 4
    assert second["groups/staleness"] == 1
    for row in completions:
        spans = [[1, min(middle, row["num_tokens"])], [2, row["num_tokens"] - middle]]
        assert row["weight_versions"] == [span for span in spans if span[1] > 0]
    # The importance weights compare the sampler's own logprobs, mixed as they are.
    assert second["sampling/logp_gap"] < 0.2


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_checkpoint_keeps_the_versions() -> None:
    spans = [(3, 1), (4, 2)]
    group = Group(Prompt(0, [1], ""), [Completion([1, 2, 3], [0.0] * 3, "stop", "x", None, spans)], 3)
    state = {"completions": [[[1, 2, 3], [0.0] * 3, "stop", "x"]], **_versions_state(group)}
    assert _completions_from_state(json.loads(json.dumps(state))) == group.completions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout": {"in_flight_updates": True}}, "max_staleness=0: no group is sampled while the policy trains"),
        ({"rollout": {"deterministic": True}}, "deterministic=True: timing decides"),
        ({"rollout": {"routing_replay": True}}, "routing_replay=True: experts are recorded for one version"),
        ({"full_determinism": True}, "full_determinism=true asks"),
    ],
)
def test_what_cannot_be_combined_is_refused(options: dict[str, Any], message: str) -> None:
    lag = {} if "max_staleness" in message else {"max_staleness": 1, "in_flight_updates": True}
    with pytest.raises((ValueError, ConfigError), match=f"in_flight_updates=true.*{message}"):
        GRPOConfig(**options | {"rollout": lag | options.get("rollout", {})})


def test_an_engine_that_cannot_keep_requests_is_refused() -> None:
    config = RolloutConfig(
        engine=f"{Path(__file__).with_name('gated_engine.py')}:Plain", max_staleness=1, in_flight_updates=True
    )
    with pytest.raises(
        ConfigError, match=r"in_flight_updates=true: the engine '.*:Plain' cannot replace weights and keep"
    ):
        engine_class(config)


def test_who_sends_weights_gets_the_next_turn() -> None:
    """A plain lock might go to a thread that asks after it, and mostly to the one that gave it back."""
    for _ in range(20):
        turns, order = Turns(), list[str]()

        def send(turns: Turns = turns, order: list[str] = order) -> None:
            with turns.sending():
                order.append("sent")

        sender = threading.Thread(target=send)
        with turns.sampling():
            sender.start()
            wait_until(lambda turns=turns: not turns._nothing_to_send.is_set(), "the sender asked")  # type: ignore[misc]
        with turns.sampling():
            order.append("sampled")
        sender.join(PATIENCE_S)
        assert order == ["sent", "sampled"]
