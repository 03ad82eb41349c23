"""Test a user's ds_config: it is adopted, completed, and refused if it contradicts the config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from torch.optim import SGD

from rlqwen.cli import main
from rlqwen.config import GRPOConfig, SFTConfig
from rlqwen.distributed import ParameterGroup, build_optimizer_step
from rlqwen.distributed.deepspeed_config import complete_ds_config, fp16_settings
from rlqwen.distributed.loss_scale import LossScale
from rlqwen.distributed.lr_schedule import build_schedulers
from rlqwen.distributed.ranks import Ranks
from rlqwen.errors import ConfigError
from tests.narrowing import present

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": True},
}
GIVEN = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "fp16": {"enabled": True},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def adopting(ds_config: dict[str, Any], **options: Any) -> SFTConfig:
    """Return a config that is given a ds_config as transformers' TrainingArguments are."""
    given: dict[str, Any] = {"deepspeed": ds_config, **options}
    return SFTConfig(**given)


def schedule(kind: str, **params: Any) -> dict[str, dict[str, Any]]:
    return {"scheduler": {"type": kind, "params": params}}


def test_auto_values_are_filled_in_from_the_config() -> None:
    args = adopting(AUTO, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert args.bf16
    assert (args.parallel.zero_stage, args.parallel.offload_optimizer) == (2, True)
    config = complete_ds_config(args, data_size=4, hidden_size=64, dtype="bf16")
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["bf16"]["enabled"]


def test_values_of_a_ds_config_file_are_adopted(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(GIVEN))
    args = GRPOConfig(parallel={"deepspeed": str(tmp_path / "ds.json")}, num_generations=8)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 4)
    assert args.fp16
    assert args.parallel.deepspeed == GIVEN
    again = GRPOConfig(**args.model_dump())
    assert again == args


@pytest.mark.parametrize(
    ("ours", "theirs", "named"),
    [
        ({"per_device_train_batch_size": 4}, GIVEN, "train_micro_batch_size_per_gpu of the ds_config is 8"),
        ({"learning_rate": 1e-4}, {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr"),
        ({"parallel": {"zero_stage": 3}}, AUTO, "parallel.zero_stage is 3, and zero_optimization.stage"),
        ({"max_grad_norm": 0.5}, {"gradient_clipping": 1.0}, "max_grad_norm is 0.5, and gradient_clipping"),
        ({}, {"optimizer": {"type": "Lamb"}}, "optimizer.type of the ds_config is 'Lamb'"),
        ({}, {"scheduler": {"type": "OneCycle"}}, "scheduler.type of the ds_config is 'OneCycle'"),
        (
            {},
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "adam_w_mode of the ds_config is False",
        ),
        ({}, {"optimizer": {"params": {"bias_correction": False}}}, "optimizer.params.bias_correction"),
        ({}, {"optimizer": {"params": {"amsgrad": True}}}, "optimizer.params.amsgrad"),
        ({}, schedule("WarmupLR", total_num_steps=9), "scheduler.params.total_num_steps of the ds_config: DeepSpeed's"),
        ({}, schedule("WarmupLR", warmup_type="cubic"), "scheduler.params.warmup_type of the ds_config is 'cubic'"),
        ({}, schedule("WarmupDecayLR", total_num_steps="9"), "scheduler.params.total_num_steps .* is not a number"),
        ({"lr_scheduler_type": "cosine"}, schedule("WarmupLR"), "lr_scheduler_type is 'cosine', and scheduler.type"),
        ({"lr_scheduler_kwargs": {"a": 1}}, schedule("WarmupLR"), "lr_scheduler_kwargs and scheduler.params"),
        ({"bf16": True}, GIVEN, "bf16=true and fp16=true exclude each other"),
        ({}, {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, "do not divide"),
        # A resolved recipe holds the number beside the text, and could not be read again.
        (
            {},
            {"optimizer": {"params": {"betas": ["0.9", 0.99]}}},
            "optimizer.params.betas of the ds_config is the text '0.9'",
        ),
        ({}, {"zero_optimization": {"stage": "2"}}, "zero_optimization.stage of the ds_config is the text '2'"),
        ({}, {"bf16": {"enabled": "yes"}}, "bf16.enabled of the ds_config is the text 'yes'"),
    ],
)
def test_contradictions_name_both_keys(ours: dict[str, Any], theirs: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        adopting(theirs, **ours).for_ranks(1)


def test_a_batch_that_does_not_divide_by_the_ranks_and_a_stray_auto_are_refused() -> None:
    args = adopting({"train_batch_size": 8}, per_device_train_batch_size=2)
    assert [args.for_ranks(size).gradient_accumulation_steps for size in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ConfigError, match="train_batch_size of the ds_config is 8, which 2 per micro-batch x 3 ranks"):
        args.for_ranks(3)
    with pytest.raises(ConfigError, match="train_batch_size of the ds_config is '8', which is not a positive whole"):
        adopting({"train_batch_size": "8"}).for_ranks(1)
    args = adopting({"train_batch_size": 8}, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="train_batch_size of the ds_config is 8, but the batch is 16"):
        complete_ds_config(args, data_size=2, hidden_size=8, dtype="fp32")
    args = adopting({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})
    with pytest.raises(ConfigError, match=r"zero_optimization\.sub_group_size"):
        complete_ds_config(args, data_size=1, hidden_size=8, dtype="fp32")


def test_offloading_needs_a_stage_that_shards_it() -> None:
    with pytest.raises(ConfigError, match="needs zero_stage 1, 2 or 3"):
        SFTConfig(parallel={"offload_optimizer": True})
    with pytest.raises(ConfigError, match="needs zero_stage 3"):
        SFTConfig(parallel={"zero_stage": 2, "offload_parameters": True})


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_a_window() -> None:
    scale = LossScale(True, {"initial_scale_power": 3, "loss_scale_window": 2})
    scale.update(overflow=True)
    assert scale.value == 4
    for _ in range(2):
        scale.update(overflow=False)
    assert scale.value == 8
    again = LossScale(True)
    again.load_state_dict(scale.state_dict())
    assert again.value == 8
    assert LossScale(False).value == 1
    assert LossScale(True, {"loss_scale": 128}).value == 128


def test_hysteresis_delays_the_halving_of_the_loss_scale() -> None:
    """DeepSpeed's `hysteresis` is counted again after a doubling, or after every update with
    `consecutive_hysteresis`."""
    for consecutive, values in ((False, [8, 8, 4]), (True, [8, 8, 8])):
        scale = LossScale(True, {"initial_scale_power": 3, "hysteresis": 2, "consecutive_hysteresis": consecutive})
        seen = []
        for overflow in (True, False, True):
            scale.update(overflow=overflow)
            seen.append(scale.value)
        assert seen == values
        again = LossScale(True, {"hysteresis": 2})
        again.load_state_dict(scale.state_dict())
        assert again.state_dict() == scale.state_dict()


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupLR", {"warmup_num_steps": 4}),
        ("WarmupLR", {"warmup_min_lr": 1e-5, "warmup_max_lr": 1e-3, "warmup_num_steps": 3, "warmup_type": "linear"}),
        ("WarmupDecayLR", {"warmup_max_lr": 1e-3, "warmup_num_steps": 2, "total_num_steps": 1000}),
        ("WarmupDecayLR", {"warmup_max_lr": 1e-3, "warmup_num_steps": 2, "total_num_steps": 4}),
        (
            "WarmupCosineLR",
            {"warmup_num_steps": 3, "total_num_steps": 7, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.2},
        ),
    ],
)
def test_learning_rates_equal_those_of_deepspeeds_scheduler(kind: str, params: dict[str, Any]) -> None:
    """Compare with DeepSpeed's own class; the rates of a second parameter group keep their ratio to the first's."""
    args = adopting(schedule(kind, **params), **{} if "warmup_max_lr" in params else {"learning_rate": 1e-3})
    theirs = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs_schedule = getattr(lr_schedules, kind)(theirs, **params)
    ours = SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-3, 5e-3)])
    (ours_schedule,) = build_schedulers(args, [ours], total_updates=6)
    for _ in range(8):
        theirs_schedule.step()
        rates = ours_schedule.get_last_lr()
        assert rates[0] == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12)
        assert rates[1] == pytest.approx(5 * rates[0])
        ours.step()
        ours_schedule.step()


def test_auto_values_of_a_scheduler_come_from_the_run() -> None:
    auto = schedule("WarmupDecayLR", warmup_min_lr="auto", warmup_max_lr="auto", warmup_num_steps="auto",
                    total_num_steps="auto")  # fmt: skip
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (scheduler,) = build_schedulers(adopting(auto, warmup_steps=2), [optimizer], total_updates=4)
    rates = []
    for _ in range(5):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.0, 1.0, 1.0, 0.5, 0.0])


def test_every_key_has_an_effect_or_is_named() -> None:
    given: dict[str, Any] = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1,
                                                  "fused": True, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
        "gradient_clipping": 0.7, "steps_per_print": 2000, "wall_clock_breakdown": False, "train_batch_size": "auto",
        "flops_profiler": {"enabled": False, "profile_step": 5}, "activation_checkpointing": {"cpu_checkpointing": True},
        "fp16": {"enabled": True, "hysteresis": 3, "auto_cast": True}, "bf16": {"enabled": False},
        "zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_cliping": 2.0,
    }  # fmt: skip
    args = adopting(given)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (1e-4, 0.8, 0.9, 1e-6)
    assert (args.weight_decay, args.max_grad_norm, args.fp16) == (0.1, 0.7, True)
    assert LossScale(True, fp16_settings(args)).hysteresis == 3
    unused = "optimizer.params.fused, steps_per_print, activation_checkpointing.cpu_checkpointing, fp16.auto_cast"
    assert args.parallel.unused_note() == f"keys of the ds_config not used: {unused}, gradient_cliping"
    engine = complete_ds_config(args, data_size=1, hidden_size=8, dtype="fp16")
    assert not {"optimizer", "scheduler", "activation_checkpointing", "gradient_cliping"} & engine.keys()
    assert engine["zero_optimization"]["overlap_comm"]
    given["zero_optimization"]["stage"] = 0
    assert "zero_optimization.overlap_comm" in present(adopting(given).parallel.unused_note())
    assert adopting(GIVEN).parallel.unused_note() is None
    assert SFTConfig().parallel.unused_note() is None


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused_without_an_engine_too() -> None:
    args = adopting({"train_batch_size": 8}, per_device_train_batch_size=2).for_ranks(1)
    part = ParameterGroup("policy", [torch.nn.Parameter(torch.zeros(1))], 1.0)
    two = Ranks()
    two.world_size = 2  # ranks that the config was not made for
    with pytest.raises(ConfigError, match="train_batch_size of the ds_config is 8, but the batch is 16"):
        build_optimizer_step([part], args, total_updates=1, ranks=two)


def test_check_and_run_name_unused_ds_config_keys(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    recipe = {
        "algorithm": "sft", "model": {"path": str(tiny_model_path)},
        "data": {"train": {"path": str(tmp_path / "rows.jsonl")}}, "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no",
                  "deepspeed": {"steps_per_print": 10}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for command in ("check", "run"):
        assert main([command, str(tmp_path / "recipe.yaml")]) == 0
        assert "keys of the ds_config not used" in " ".join("".join(capsys.readouterr()).split())
