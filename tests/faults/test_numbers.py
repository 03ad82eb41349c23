"""Inject faults into numbers: values that are not finite, wrong logprobs, and completions with nothing to learn.

The tests run real trainers on a tiny model. Faults in completions are injected between the transformers engine and the
trainer (`alter`); the pool of vLLM workers returns the same type.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlqwen import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from rlqwen.data.cleaning.texts import Row
from rlqwen.distributed import UpdateResult
from rlqwen.errors import ConfigError, DataError, NonFiniteError
from rlqwen.packing.batch import PackedBatch
from rlqwen.reporting import read_metrics
from rlqwen.types import Completion, GroupRequest
from tests.narrowing import present

PROMPTS = [{"prompt": [{"role": "user", "content": f"{i} + 1 = ?"}]} for i in range(12)]
ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(12)]


def prefers_even(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def make_sft(model: Path, folder: Path, **options: Any) -> SFTTrainer:
    args = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no"}
    return SFTTrainer(str(model), SFTConfig(learning_rate=1e-3, **args | options), train_dataset=ROWS)


def make_online(
    trainer: Any,
    config: type[GRPOConfig] | type[PPOConfig],
    model: Path,
    folder: Path,
    *,
    reward: Callable[..., Any] = prefers_even,
    rows: Sequence[Row] = PROMPTS,
    **options: Any,
) -> Any:
    args = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 6, "learning_rate": 1e-3, "save_strategy": "no",
        "rollout": {"engine": "transformers"}, "scoring": {"in_process": [reward.__name__]},
    }  # fmt: skip
    return trainer(str(model), reward, config(**args | options), rows)


def make_grpo(model: Path, folder: Path, **options: Any) -> Any:
    return make_online(GRPOTrainer, GRPOConfig, model, folder, **options)


def make_ppo(model: Path, folder: Path, **options: Any) -> Any:
    return make_online(PPOTrainer, PPOConfig, model, folder, num_ppo_epochs=1, **options)


def steps(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def alerts(folder: Path) -> dict[Any, dict[str, Any]]:
    return {line["watch/symptom"]: line for line in read_metrics(folder) if "watch/symptom" in line}


def weights(trainer: Any) -> list[Tensor]:
    return [parameter.detach().clone() for part in trainer.parameter_groups() for parameter in part.parameters]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def follow_weights(trainer: Any, inject: Any = lambda update: None) -> Any:
    """Collect the weights after every update, with the initial weights at 0; call `inject(n)` before update n."""
    seen = [weights(trainer)]
    step_once: Callable[..., UpdateResult] = trainer.update

    def update(micro_batches: Sequence[PackedBatch], **options: Any) -> UpdateResult:
        inject(len(seen))
        try:
            return step_once(micro_batches, **options)
        finally:
            seen.append(weights(trainer))

    trainer.update = update
    return seen


def alter(trainer: Any, change: Callable[[Any, Any], Completion]) -> None:
    """Pass every completion that is sampled for training through `change(completion, number)`, in order."""
    engine, numbers = trainer.rollouts.require_sampler().engine, itertools.count()
    generate = engine.generate

    def altered(requests: Sequence[GroupRequest]) -> Iterator[Any]:
        for group in generate(requests):
            group.completions = [change(completion, next(numbers)) for completion in group.completions]
            yield group

    engine.generate = altered


# Values that are not finite


def nan_logits(trainer: Any, forwards: Any) -> None:
    """Make one hidden state before the head NaN in these training forwards, counted from 0."""
    count = itertools.count()

    def hook(module: Any, inputs: Collection[str], output: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and next(count) in forwards:
            output = output.clone()
            output[0, -2] = math.nan  # it predicts the last target
        return output

    trainer.policy.base_model.model.norm.register_forward_hook(hook)


@pytest.mark.fault(
    "NaN in the logits of one token", "that update is skipped, weights bit-unchanged, batch saved; the run goes on"
)
@pytest.mark.parametrize("make", [make_sft, make_grpo, make_ppo])
def test_nan_in_logits(tiny_model_path: Path, tmp_path: Path, make: Any) -> None:
    trainer = make(tiny_model_path, tmp_path)
    nan_logits(trainer, {1})
    seen = follow_weights(trainer)
    trainer.train()
    assert same(seen[1], seen[2])
    assert not same(seen[0], seen[1])
    assert not same(seen[2], seen[3])
    assert steps(trainer, "updates/skipped") == [0, 1, 0]
    (kept,) = (tmp_path / "nonfinite").iterdir()
    assert kept.name == "step-000002-0.safetensors"
    assert load_file(kept)["input_ids"].numel() > 0
    assert alerts(tmp_path)["skipped"]["step"] == 2


@pytest.mark.fault("NaN in one gradient", "that update is skipped, weights bit-unchanged, batch saved")
def test_nan_in_a_gradient(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_sft(tiny_model_path, tmp_path)

    def inject(update: int) -> None:
        if update == 2:
            present(trainer.policy.trained_parameters[-1].grad).view(-1)[0] = math.nan

    seen = follow_weights(trainer, inject)
    trainer.train()
    assert [same(a, b) for a, b in itertools.pairwise(seen)] == [False, True, False]
    assert [path.name for path in (tmp_path / "nonfinite").iterdir()] == ["step-000002-0.safetensors"]
    assert all(map(math.isfinite, (steps(trainer)[0], steps(trainer)[2])))


@pytest.mark.fault(
    "NaN or infinity in one of the optimizer's moments",
    "noticed before it reaches a weight: weights bit-unchanged, batches saved, stop after K with the moments named",
)
@pytest.mark.parametrize(("moment", "bad"), [("exp_avg", math.nan), ("exp_avg_sq", math.nan), ("exp_avg_sq", math.inf)])
def test_a_nan_in_an_optimizer_moment(tiny_model_path: Path, tmp_path: Path, moment: str, bad: float) -> None:
    trainer = make_sft(tiny_model_path, tmp_path, max_steps=6, max_nonfinite_steps=2)

    def inject(update: int) -> None:
        if update == 2:
            state = list(trainer.optimizer.optimizers[0].state.values())[-1]
            state[moment].view(-1)[0] = bad

    seen = follow_weights(trainer, inject)
    with pytest.raises(NonFiniteError, match="a moment of the optimizer was not finite in 2 updates in a row"):
        trainer.train()
    assert [same(a, b) for a, b in itertools.pairwise(seen)] == [False, True, True]
    assert len(list((tmp_path / "nonfinite").iterdir())) == 2


@pytest.mark.fault(
    "NaN in the logits, step after step", "no weight changes; the run stops after K with every batch saved"
)
def test_nan_in_every_step(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_grpo(tiny_model_path, tmp_path, max_steps=9, max_nonfinite_steps=3)
    nan_logits(trainer, range(100))
    seen = follow_weights(trainer)
    with pytest.raises(NonFiniteError, match="3 updates in a row"):
        trainer.train()
    assert len(seen) == 4
    assert same(seen[0], seen[-1])
    assert len(list((tmp_path / "nonfinite").iterdir())) == 3


# Wrong logprobs


def sharpen(trainer: Any) -> None:
    """Make the tiny model's distribution uneven like a trained model's, because a random one is nearly uniform."""
    with torch.no_grad():
        trainer.policy.base_model.model.norm.weight.mul_(6.0)


def without_logprobs(completion: Completion, number: int) -> Any:
    nothing: Any = None  # what a sampler must not give
    completion.logprobs = nothing
    return completion


def without_some_logprobs(completion: Completion, number: int) -> Any:
    return without_logprobs(completion, number) if number % 8 == 0 else completion


def shifted_logprobs(completion: Completion, number: int) -> Any:
    completion.logprobs = [0.0, *completion.logprobs[:-1]]
    return completion


@pytest.mark.fault("the sampler's logprobs are missing", "the monitor reports a mismatch at the first step")
@pytest.mark.parametrize("make", [make_grpo, make_ppo])
@pytest.mark.parametrize("change", [without_logprobs, without_some_logprobs])
def test_missing_logprobs(
    tiny_model_path: Path, tmp_path: Path, make: Any, change: Callable[[Any, Any], Completion]
) -> None:
    trainer = make(tiny_model_path, tmp_path, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    alter(trainer, change)
    trainer.train()
    alert = alerts(tmp_path)["mismatch"]
    assert alert["step"] == 1
    assert alert["watch/value"] == steps(trainer, "sampling/logp_missing")[0] > 0
    assert "without the sampler's logprobs" in alert["watch/cause"]


@pytest.mark.fault(
    "the sampler's logprobs are shifted by one token", "the monitor reports a mismatch at the first step"
)
@pytest.mark.parametrize("make", [make_grpo, make_ppo])
def test_shifted_logprobs(tiny_model_path: Path, tmp_path: Path, make: Any) -> None:
    """Compare with the same run with correct logprobs, which gives no alert."""
    for name, change in (("right", lambda completion, number: completion), ("shifted", shifted_logprobs)):
        trainer = make(tiny_model_path, tmp_path / name, max_steps=1)
        sharpen(trainer)
        alter(trainer, change)
        trainer.train()
        assert ("mismatch" in alerts(tmp_path / name)) == (name == "shifted"), steps(trainer, "sampling/logp_gap")


@pytest.mark.fault("NaN among the sampler's logprobs", "that update is skipped, weights bit-unchanged, batch saved")
def test_nan_in_logprobs(tiny_model_path: Path, tmp_path: Path) -> None:
    def change(completion: Completion, number: int) -> Any:
        if number == 3:
            completion.logprobs[0] = math.nan
        return completion

    trainer = make_grpo(tiny_model_path, tmp_path, max_steps=2, vllm_importance_sampling_mode="token_truncate")
    alter(trainer, change)
    seen = follow_weights(trainer)
    trainer.train()
    assert [same(a, b) for a, b in itertools.pairwise(seen)] == [True, False]
    assert len(list((tmp_path / "nonfinite").iterdir())) == 1


# Completions with nothing to learn from


def emptied(completion: Completion, number: int) -> Completion:
    return Completion([], [], "stop", "")


@pytest.mark.fault("one completion is empty", "it counts as a completion of no tokens; every figure stays finite")
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_training_handles_one_empty_completion(tiny_model_path: Path, tmp_path: Path, loss_type: str) -> None:
    trainer = make_grpo(tiny_model_path, tmp_path, max_steps=1, beta=0.1, loss_type=loss_type)
    alter(trainer, lambda completion, number: emptied(completion, number) if number == 1 else completion)
    seen = follow_weights(trainer)
    trainer.train()
    assert all(math.isfinite(steps(trainer, key)[0]) for key in ("loss", "grad_norm", "kl", "entropy"))
    assert not same(seen[0], seen[1])


@pytest.mark.fault("all completions are empty", "nothing is trained, nothing fails, and the monitor says so")
@pytest.mark.parametrize("make", [make_grpo, make_ppo])
def test_only_empty_completions(tiny_model_path: Path, tmp_path: Path, make: Any) -> None:
    trainer = make(tiny_model_path, tmp_path)
    alter(trainer, emptied)
    trainer.train()
    assert steps(trainer, "completions/mean_length") == [0.0] * 3
    assert steps(trainer, "updates/skipped") == [0.0] * 3
    assert alerts(tmp_path)["empty"]["step"] == 2


@pytest.mark.fault("completions that are the end of turn and no more", "trained on as one token; the monitor says so")
def test_end_of_turn_first(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_grpo(tiny_model_path, tmp_path, max_steps=2, beta=0.1)
    eos = trainer.processing_class.eos_token_id
    alter(trainer, lambda completion, number: Completion([eos], [-5.0], "stop", ""))
    trainer.train()
    assert all(map(math.isfinite, steps(trainer)))
    assert steps(trainer, "completions/truncated") == [0.0] * 2
    assert alerts(tmp_path)["empty"]["step"] == 2


@pytest.mark.fault(
    "no completion ever ends", "with mask_truncated_completions nothing is trained, and the monitor names the limit"
)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_no_end_of_turn(tiny_model_path: Path, tmp_path: Path, beta: float) -> None:
    def cut(completion: Completion, number: int) -> Any:
        completion.finish_reason = "length"
        return completion

    trainer = make_grpo(tiny_model_path, tmp_path, mask_truncated_completions=True, beta=beta)
    alter(trainer, cut)
    seen = follow_weights(trainer)
    trainer.train()
    assert same(seen[0], seen[-1])
    assert steps(trainer) == [0.0] * 3
    alert = alerts(tmp_path)["masked"]
    assert alert["step"] == 1
    assert alert["watch/advice"] == [
        "train.max_completion_length: 6 -> try 12",
        "train.mask_truncated_completions: True -> false",
    ]


def nothing(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.fault(
    "every reward is zero and every completion cut off", "the monitor names the limit and the model's end of turn"
)
def test_zero_reward_and_cut_off(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_grpo(
        tiny_model_path, tmp_path, max_steps=5, reward=nothing, watch={"zero_reward": {"truncated": 0.5}}
    )
    trainer.train()
    found = alerts(tmp_path)
    assert found["zero_reward"]["step"] == 3
    assert found["zero_reward"]["watch/advice"][0] == "train.max_completion_length: 6 -> try 12"
    assert found["no_signal"]["step"] == 5


@pytest.mark.fault(
    "all groups have equal rewards", "loss and gradient are exactly 0, no weight moves, the monitor says so"
)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_zero_variance(tiny_model_path: Path, tmp_path: Path, value: float) -> None:
    def constant(completions: list[str], **kwargs: Any) -> list[float]:
        return [value] * len(completions)

    trainer = make_grpo(tiny_model_path, tmp_path, reward=constant, watch={"no_signal": {"steps": 2}})
    seen = follow_weights(trainer)
    trainer.train()
    assert steps(trainer) == steps(trainer, "grad_norm") == [0.0] * 3
    assert same(seen[0], seen[-1])
    assert alerts(tmp_path)["no_signal"]["step"] == 2
    assert "idle" not in alerts(tmp_path)


@pytest.mark.fault(
    "a batch whose every label is masked", "a step without loss or change, no NaN, and the monitor says so"
)
def test_all_masked(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_sft(tiny_model_path, tmp_path)
    for row in itertools.chain.from_iterable(trainer.train_rows):
        row.loss_mask[:] = [False] * len(row.loss_mask)
    seen = follow_weights(trainer)
    trainer.train()
    assert same(seen[0], seen[-1])
    assert steps(trainer) == [0.0] * 3
    assert alerts(tmp_path)["masked"]["step"] == 1


@pytest.mark.fault(
    "the padding token is the end of turn", "the end stays a target, and generation still ends: same figures"
)
@pytest.mark.parametrize("make", [make_sft, make_grpo])
def test_pad_is_eos(tiny_model_path: Path, tmp_path: Path, make: Any) -> None:
    from transformers import AutoTokenizer

    runs = []
    for name in ("own", "eos"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        assert tokenizer.pad_token != tokenizer.eos_token
        if name == "eos":
            tokenizer.pad_token = tokenizer.eos_token
        trainer = make(tiny_model_path, tmp_path / name, max_steps=2)
        trainer.close()
        given = {"processing_class": tokenizer, "train_dataset": ROWS if make is make_sft else PROMPTS}
        funcs = {} if make is make_sft else {"reward_funcs": prefers_even}
        trainer.args.output_dir = str(tmp_path / f"{name}-run")
        runs.append(type(trainer)(str(tiny_model_path), args=trainer.args, **funcs, **given))
        runs[-1].train()
    assert steps(runs[0]) == steps(runs[1])
    key = "tokens/targets" if make is make_sft else "completions/mean_length"
    assert steps(runs[0], key) == steps(runs[1], key)


@pytest.mark.fault("a prompt longer than the context leaves room for", "dropped and counted, or refused with its row")
def test_an_over_long_prompt(tiny_model_path: Path, tmp_path: Path) -> None:
    rows = [*PROMPTS, {"prompt": [{"role": "user", "content": "1 + " * 4000}]}]
    trainer = make_grpo(tiny_model_path, tmp_path / "dropped", rows=rows, max_steps=1)
    trainer.train()
    assert trainer.reports["train"].num_overlong == 1
    assert len(trainer.train_rows) == len(PROMPTS)
    with pytest.raises(DataError, match="row 12"):
        make_grpo(tiny_model_path, tmp_path / "refused", rows=rows, overlong_prompts="refuse")


@pytest.mark.fault("a prompt as long as the engine's context", "refused with the arithmetic before anything is sampled")
def test_a_prompt_without_room(tiny_model_path: Path, tmp_path: Path) -> None:
    rollout = {"engine": "transformers", "max_model_length": 8}
    with pytest.raises((ConfigError, DataError), match=r"8"):
        make_grpo(tiny_model_path, tmp_path, max_steps=1, rollout=rollout).train()
