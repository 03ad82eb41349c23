"""Test layouts of ranks, and what they divide of the memory of one GPU."""

import pytest

from rlqwen.config import ParallelConfig
from rlqwen.errors import ConfigError
from rlqwen.preflight.memory_plan import BACKWARD, GIB, LOAD, STEP, MemoryPlan
from rlqwen.preflight.memory_planner import plan_memory
from rlqwen.preflight.parallel_layout import ParallelLayout
from tests.planning.models import sft, size_of


def planned(name: str, text: str, ranks: int, tokens: int = 4096, **train: object) -> MemoryPlan:
    recipe = sft(name, tokens, train=train)
    return plan_memory(recipe, size_of(name), layout=ParallelLayout.parse(text, ranks))


def test_a_layout_is_read_as_it_is_written() -> None:
    layout = ParallelLayout.parse("tp=2,ep=4", 16)
    assert (layout.engine, layout.fsdp, layout.tp, layout.ep, layout.data_ranks) == ("fsdp2", 8, 2, 4, 8)
    assert str(layout) == "fsdp=8,tp=2,ep=4"
    zero = ParallelLayout.parse("zero=2,sp=2,offload=true", 8)
    assert (zero.engine, zero.zero_stage, zero.data_ranks) == ("deepspeed", 2, 4)
    assert ParallelLayout.parse(str(zero), 8) == zero


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fsdp=8,tp=4", "makes fsdp=8 x tp=4 x pp=1 = 32 ranks, and there are 16 GPUs"),
        ("dp=8", "'dp=8' is none of"),
        ("tp=0", "'tp=0' is none of"),
        ("engine=fsdp2,zero=3", "zero= is for engine=deepspeed"),
    ],
)
def test_what_is_no_layout_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ParallelLayout.parse(text, 16)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("Qwen3-30B-A3B", "tp=8", r"tp=8 does not divide the key-value heads \(4\)"),
        ("Qwen3-30B-A3B", "pp=16,fsdp=4,ep=3", r"ep=3 does not divide the fsdp ranks \(4\)"),
        ("Qwen3-32B", "ep=8", "ep=8: the model has no experts"),
        ("Qwen3-32B", "fsdp=4,sp=16", r"sp=16 does not divide the fsdp ranks \(4\)"),
        ("Qwen3-14B", "pp=32,fsdp=2", r"pp=32 does not divide the layers \(40\)"),
        ("Qwen3-30B-A3B", "engine=deepspeed,ep=8", "ep=8 needs engine=fsdp2"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_says_why(name: str, text: str, said: str) -> None:
    ranks = 64 if "fsdp" not in text else {"pp=16,fsdp=4,ep=3": 64, "fsdp=4,sp=16": 4, "pp=32,fsdp=2": 64}[text]
    with pytest.raises(ConfigError, match=said):
        ParallelLayout.parse(text, ranks).check(size_of(name).text_config)


def test_the_layout_of_a_recipe_is_that_of_its_parallel_section() -> None:
    layout = ParallelLayout.of(ParallelConfig(zero_stage=3, sequence_parallel_size=4), 8)
    assert (layout.engine, layout.fsdp, layout.sp, layout.zero_stage, layout.data_ranks) == ("deepspeed", 8, 4, 3, 2)
    tensor = ParallelLayout.of(ParallelConfig(autotp_size=2), 8)
    assert (tensor.fsdp, tensor.tp, tensor.num_ranks) == (4, 2, 8)


def test_fsdp2_holds_sixteen_bytes_per_parameter_divided_by_all_ranks() -> None:
    name = "Qwen3-8B"
    total = size_of(name).total
    for text, ranks in (("fsdp=8", 8), ("fsdp=64", 64), ("fsdp=16,tp=4", 64)):
        parts = planned(name, text, ranks).parts
        assert [parts[part][STEP] * ranks / total for part in ("weights", "gradients", "optimizer")] == [4, 4, 8]
        # Loading: two layers besides the shard. No rank ever holds the model.
        assert parts["weights"][LOAD] < 4.5 * total / ranks + 2 * 4 * total / 36
    offloaded = planned(name, "fsdp=8,offload=true", 8)
    assert offloaded.total(STEP) < 1 * GIB
    piped = planned(name, "fsdp=8,pp=4", 32, gradient_accumulation_steps=8)
    assert piped.parts["weights"][STEP] == pytest.approx(4 * total / 32, rel=0.35)  # with all of one embedding


def test_expert_parallel_ranks_gather_no_experts() -> None:
    name = "Qwen3-30B-A3B"
    whole, divided = planned(name, "fsdp=8", 8).parts, planned(name, "fsdp=8,ep=8", 8).parts
    (shape,) = size_of(name).shapes
    saved = (2 * 2 + 2 + 4) * shape.experts * 7 / 8
    sent = 2 * 2 * 4096 * 8 * 2048
    assert whole["buffers"][BACKWARD] - divided["buffers"][BACKWARD] == pytest.approx(saved - sent)
    assert whole["weights"][STEP] == divided["weights"][STEP]


def test_groups_divide_what_is_kept_for_the_backward_pass() -> None:
    name = "Qwen3-32B"
    plain = planned(name, "fsdp=64", 64, gradient_checkpointing=False).parts["activations"][BACKWARD]
    rows = planned(name, "fsdp=64,sp=8", 64, gradient_checkpointing=False).parts["activations"][BACKWARD]
    assert rows == pytest.approx(plain / 8)
    tensor = planned(name, "fsdp=16,tp=4", 64, gradient_checkpointing=False).parts["activations"][BACKWARD]
    assert plain / 4 < tensor < plain / 2  # the residual stream is on each of these ranks
    stages = planned(name, "fsdp=16,pp=4", 64, gradient_checkpointing=False, gradient_accumulation_steps=8)
    # 1F1B: the first stage keeps a quarter of the layers for four micro-batches.
    assert stages.parts["activations"][BACKWARD] == pytest.approx(plain, rel=0.05)
