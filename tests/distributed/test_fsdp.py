"""Compare FSDP2 on real ranks, which share weights, gradients and optimizer state, with one process that holds them whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from rlqwen import SFTConfig
from rlqwen.config import ParallelConfig
from rlqwen.distributed import ParameterGroup, Ranks, build_optimizer_step, gathered, is_sharded
from rlqwen.errors import ConfigError
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import PackedBatch, idle_batch, pack
from tests.distributed.test_zero import check
from tests.forked_ranks import run_ranks
from tests.models.test_policy import make_model, skewed_trees
from tests.packing.test_sequence_parallel import train
from tests.ranked import COMMON, _sft, run_on_two_ranks

EXACT = [f"{case}@fsdp2" for case in ("sft", "sft_lora", "ppo_head", "grpo_idle", "grpo_arrival")]
EXACT += ["sft@fsdp2_recomputed", "sft@fsdp2_saved"]
ROUNDED = ["sft@fsdp2_bf16", "sft@fsdp2_fp16"]
LONG = [f"{case}@fsdp2" for case in ("dpo", "dpo_lora", "reward", "ppo", "grpo")]


@pytest.fixture(scope="module")
def runs(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("fsdp2")
    return folder, run_on_two_ranks([*EXACT, *ROUNDED], tiny_model_path, folder)


@pytest.mark.parametrize("name", EXACT)
def test_sharding_changes_only_rounding(
    name: str, runs: tuple[Path, list[dict[Any, Any]]], tiny_model_path: Path, tmp_path: Path
) -> None:
    check(name, runs[1], tiny_model_path, tmp_path, rel=2e-4)


@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision_stays_close_to_float32(
    name: str, runs: tuple[Path, list[dict[Any, Any]]], tiny_model_path: Path, tmp_path: Path
) -> None:
    check(name, runs[1], tiny_model_path, tmp_path, rel=2e-2)


@pytest.mark.slow_fault
@pytest.mark.fault("unequal work for two ranks under FSDP2, every trainer", "no hang; the same curve as on one rank")
def test_every_trainer_under_fsdp2(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    by_rank = run_on_two_ranks(LONG, tiny_model_path, tmp_path / "two")
    for name in LONG:
        check(name, by_rank, tiny_model_path, tmp_path / name, rel=5e-4)


@pytest.mark.slow_fault
@pytest.mark.fault("weights in FSDP2's shards on their way to vLLM", "whole and exact: the canary agrees at every sync")
def test_shards_reach_vllm_exactly(tiny_model_path: Path, tmp_path: Path) -> None:
    main, other = run_on_two_ranks(["vllm@fsdp2"], tiny_model_path, tmp_path)
    gaps = [entry["sync/canary_gap"] for entry in main["vllm@fsdp2"]["history"] if "sync/canary_gap" in entry]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert main["vllm@fsdp2"]["digest"] == other["vllm@fsdp2"]["digest"]


def test_one_process_goes_on_with_a_checkpoint_of_two_ranks(
    runs: tuple[Path, list[dict[Any, Any]]], tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, by_rank = runs
    monkeypatch.setitem(COMMON, "resume_allow_changes", True)
    trainer = _sft(str(tiny_model_path), tmp_path / "on", eval_generation={"metrics": ["exact_match"], "max_tokens": 4})
    trainer.train(folder / "sft@fsdp2_saved" / "checkpoints" / "step-000002")
    (last,) = [line for line in trainer.state.log_history if "loss" in line and line["step"] == 3]
    (wanted,) = [line for line in by_rank[0]["sft@fsdp2_saved"]["history"] if "loss" in line and line["step"] == 3]
    assert last["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    ours = load_file(tmp_path / "on" / "final" / "model.safetensors")
    theirs = load_file(folder / "sft@fsdp2_saved" / "final" / "model.safetensors")
    assert all(ours[key].allclose(theirs[key], atol=1e-6) for key in theirs)


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """On the same number of ranks, with moments, weights and data where they were."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def run(name: str, checkpoint: Path | None = None) -> None:
        _sft("builtin:tiny-qwen3", tmp_path / name, parallel={"engine": "fsdp2"}, **options).train(checkpoint)

    run_ranks(lambda: run("straight"))
    run_ranks(lambda: run("resumed", tmp_path / "straight" / "checkpoints" / "step-000002"))
    parts = tmp_path / "straight" / "checkpoints" / "step-000002" / "optimizer"
    sizes = [path.stat().st_size for path in parts.iterdir()]
    assert len(sizes) == 2  # one of each rank
    assert max(sizes) < 1.05 * min(sizes)
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("resumed", "straight"))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


def update(policy: Policy, args: SFTConfig, ranks: Ranks, batches: list[PackedBatch]) -> dict[str, Any]:
    """Return what two updates on `batches`, of which each rank forwards its share, leave of a policy."""
    group = ParameterGroup("policy", policy.trained_parameters, 0.1, policy.trained_names, policy.root)
    step = build_optimizer_step([group], args, total_updates=3, ranks=ranks)
    norms, logprobs = [], []
    for _ in range(2):
        own = list(ranks.share(batches))
        own += [idle_batch(skewed_trees()[0])] * (-(-len(batches) // ranks.data_size) - len(own))
        for number, batch in enumerate(own):
            is_idle = number * ranks.data_size + ranks.data_rank >= len(batches)
            logp_N, _ = policy.logprobs(batch)
            if policy.has_reference and policy._reference is not None:
                logp_N = logp_N + 0.1 * policy.kl_to_reference(batch)
            step.backward(-logp_N.sum() / 500 + policy.router_loss(0.0 if is_idle else 1 / len(batches)))
        norms.append(step.step().grad_norm)
        policy.version += 1
    if policy._reference is not None:
        policy.refresh_reference(0.5)
    with torch.no_grad():
        logprobs = [policy.logprobs(batch)[0] for batch in batches]
        if policy.has_reference:
            logprobs += [policy.reference_logprobs(batch) for batch in batches]
    cut = [weight for weight in policy.model.parameters() if is_sharded(weight)]
    return {
        "norms": norms,
        "logprobs": torch.cat(logprobs),
        "weights": {name: weight.clone() for name, weight in policy.export_weights()},
        "cut": sum(weight.numel() for weight in cut),
        "held": sum(getattr(weight, "_local_tensor", weight).numel() for weight in policy.model.parameters()),
    }


def lora(targets: list[str] | str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=targets, init_lora_weights=False)


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense, own reference": ("qwen3", {}, {"reference": True}),
    "tied": ("qwen3", {"tie_word_embeddings": True}, {"reference": True}),
    "biases": ("qwen2", {}, {}),
    "experts": ("qwen3_moe", {"router_aux_loss_coef": 0.01}, {}),
    "delta net": ("qwen3_next", {}, {}),
    "adapter": ("qwen3", {}, {"peft_config": lora(["q_proj", "up_proj"]), "reference": True}),
    "adapter on experts": ("qwen3_moe", {}, {"peft_config": lora("all-linear")}),
    "recomputed": ("qwen3", {"gradient_checkpointing": True}, {}),
    "selective": ("qwen3", {"gradient_checkpointing": "selective"}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_trains_as_on_one_rank(kind: str) -> None:
    architecture, options, of_policy = KINDS[kind]
    batches = [pack(skewed_trees(seed)) for seed in range(3)]  # one rank of two has an idle forward

    def train_it(engine: str) -> dict[str, Any]:
        parallel = ParallelConfig(engine=engine)
        args = SFTConfig(
            use_cpu=True, adam_epsilon=1.0, optim="adamw_torch", max_grad_norm=0.05, parallel=parallel,
            **{key: value for key, value in options.items() if key != "tie_word_embeddings"},
        )  # fmt: skip
        ranks = Ranks(args.parallel)
        shape = {key: value for key, value in options.items() if key == "tie_word_embeddings"}
        torch.manual_seed(1)
        return update(Policy(make_model(architecture, **shape), args, **of_policy), args, ranks, batches)

    alone = train_it("deepspeed")
    assert alone["cut"] == 0
    whole = alone["held"]
    for found in run_ranks(lambda: train_it("fsdp2")):
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        torch.testing.assert_close(found["logprobs"], alone["logprobs"], atol=2e-5, rtol=1e-4)
        assert found["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, atol=1e-5, rtol=1e-4)
        assert found["cut"] > 0.95 * whole
        assert found["held"] < 0.55 * whole


@pytest.mark.parametrize("ranks", [3, 4])
def test_ranks_that_do_not_divide_a_matrix_train_as_one(ranks: int, tmp_path: Path) -> None:
    """Three ranks hold parts of unequal size, and some of them none."""
    metrics, _ = train("dpo", tmp_path / "one", 12)
    parallel: Any = {"engine": "fsdp2"}
    for found in run_ranks(lambda: train("dpo", tmp_path / "many", 12 // ranks, **parallel)[0], world_size=ranks):
        assert found == pytest.approx(metrics, rel=2e-3)  # the balance of experts depends on the micro-batch


def test_sequence_parallel_ranks_share_weights_too(tmp_path: Path) -> None:
    metrics, _ = train("sft", tmp_path / "one", 8)
    parallel: Any = {"engine": "fsdp2", "sequence_parallel_size": 2}
    for found in run_ranks(lambda: train("sft", tmp_path / "four", 4, **parallel)[0], world_size=4):
        assert found == pytest.approx(metrics, rel=2e-3)


def test_weights_are_whole_inside_gathered_and_kept_if_modified() -> None:
    def in_a_rank() -> tuple[list[bool], Tensor, Tensor]:
        args = SFTConfig(use_cpu=True, parallel=ParallelConfig(engine="fsdp2"))
        Ranks(args.parallel)
        policy = Policy(make_model(tie_word_embeddings=True), args)
        head: Any = policy.base_model.get_output_embeddings()
        with gathered([head, policy.base_model.get_input_embeddings()], modify=True):
            inside = is_sharded(head.weight)
            head.weight.data.fill_(3.0)
        with gathered([head]):
            head.weight.data.fill_(4.0)  # not kept
        with gathered([head]):
            kept = head.weight.detach().clone()
        return [inside, is_sharded(head.weight)], kept, head.weight.to_local().detach().clone()

    for (inside, outside), kept, own in run_ranks(in_a_rank):
        assert (inside, outside) == (False, True)
        assert kept.eq(3.0).all()
        assert own.eq(3.0).all()
        assert len(own) == len(kept) // 2


@pytest.mark.parametrize(
    "of_deepspeed",
    [{"zero_stage": 3}, {"offload_optimizer": True, "zero_stage": 1}, {"deepspeed": {}}, {"autotp_size": 2}],
)
def test_what_is_of_deepspeed_is_refused_with_fsdp2(of_deepspeed: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValueError), match="engine is fsdp2"):
        SFTConfig(parallel={"engine": "fsdp2", **of_deepspeed})
