"""A user's ds_config: adopted as it is, completed, and refused where it contradicts the config."""

import json

import pytest

from rlqwen.config import GRPOConfig, SFTConfig
from rlqwen.errors import ConfigError
from rlqwen.parallel.ds_config import complete_ds_config
from rlqwen.parallel.loss_scale import LossScale

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


def test_auto_is_filled_in():
    args = SFTConfig(deepspeed=AUTO, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert args.bf16
    assert (args.parallel.zero_stage, args.parallel.offload_optimizer) == (2, True)
    config = complete_ds_config(args, data_size=4, hidden_size=64, dtype="bf16")
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["bf16"]["enabled"]


def test_what_a_file_gives_is_adopted(tmp_path):
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
        ({"bf16": True}, GIVEN, "bf16=true and fp16=true exclude each other"),
        ({}, {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, "do not divide"),
    ],
)
def test_contradictions_are_refused_by_name(ours, theirs, named):
    with pytest.raises(ConfigError, match=named):
        SFTConfig(deepspeed=theirs, **ours)


def test_a_batch_that_the_ranks_do_not_make_and_a_stray_auto_are_refused():
    args = SFTConfig(deepspeed={"train_batch_size": 8}, per_device_train_batch_size=2)
    with pytest.raises(ConfigError, match="train_batch_size of the ds_config is 8, but the batch is 16"):
        complete_ds_config(args, data_size=2, hidden_size=8, dtype="fp32")
    args = SFTConfig(deepspeed={"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})
    with pytest.raises(ConfigError, match=r"zero_optimization\.sub_group_size"):
        complete_ds_config(args, data_size=1, hidden_size=8, dtype="fp32")


def test_there_must_be_something_to_offload():
    with pytest.raises(ConfigError, match="needs zero_stage 1, 2 or 3"):
        SFTConfig(parallel={"offload_optimizer": True})
    with pytest.raises(ConfigError, match="needs zero_stage 3"):
        SFTConfig(parallel={"zero_stage": 2, "offload_parameters": True})


def test_the_scale_of_the_loss_halves_at_once_and_doubles_in_time():
    scale = LossScale(True, {"initial_scale_power": 3, "loss_scale_window": 2})
    scale.update(overflow=True)
    assert scale.value == 4
    for _ in range(2):
        scale.update(overflow=False)
    assert scale.value == 8
    again = LossScale(True)
    again.restore(scale.progress())
    assert again.value == 8
    assert LossScale(False).value == 1
    assert LossScale(True, {"loss_scale": 128}).value == 128
