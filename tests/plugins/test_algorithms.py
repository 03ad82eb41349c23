"""Test algorithms as plugins: named by file or entry point, with a config and sections of their own."""

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml

from rlqwen.cli import main
from rlqwen.config import GRPOConfig, Recipe, SFTConfig
from rlqwen.config.algorithms import config_class, short_name, trainer_class
from rlqwen.config.recipe_yaml import load_recipe, load_recipes, write_resolved
from rlqwen.errors import ConfigError
from rlqwen.reporting import read_summary

TRAINER = """\
from rlqwen.trainers.sft import SFTTrainer

class QuietTrainer(SFTTrainer):
    "Fine-tune, and say so in the summary."
    algorithm = "quiet"
"""
CONFIG = """\
from typing import ClassVar
from pydantic import Field
from rlqwen.config import SFTConfig
from rlqwen.config.base import Section

class MixerConfig(Section):
    share: float = 0.5

class MixedConfig(SFTConfig):
    "Fine-tune on a mixture."
    trainer: ClassVar[str] = "quiet_trainer:QuietTrainer"
    mixer: MixerConfig = Field(default_factory=MixerConfig)
    model: MixerConfig | None = None
"""


def write_recipe(folder: Path, algorithm: object, *, model: object = "builtin:tiny-qwen3", **keys: Any) -> Path:
    data = {"train": {"generator": "arithmetic", "args": {"kind": "sft", "size": 8}}}
    train = {"max_steps": 1, "save_strategy": "no"} | dict(keys.pop("train", {}))
    recipe = {
        "algorithm": algorithm,
        "model": {"path": str(model)},
        "data": data,
        "train": train,
        "output_dir": "runs/x",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | keys, sort_keys=False))
    return path


def share_of(recipe: Recipe, section: str = "mixer") -> Any:
    """Return a key of MixedConfig, a class that is only there while a test runs."""
    return getattr(recipe.train, section).share


def register(folder: Path, package: str, **algorithms: str) -> None:
    """Make a package that registers algorithms, as pip would install it."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in algorithms.items()]
    (info / "entry_points.txt").write_text("\n".join(["[rlqwen.trainers]", *lines, ""]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working directory and import path that holds the plugin's modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "quiet_trainer.py").write_text(TRAINER)
    (tmp_path / "mixed_config.py").write_text(CONFIG)
    return tmp_path


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# Running


def test_a_trainer_in_a_file_runs_from_a_recipe(folder: Path, tiny_model_path: Path) -> None:
    recipe = write_recipe(folder, "quiet_trainer.py:QuietTrainer", model=tiny_model_path)
    assert main(["run", str(recipe)]) == 0
    assert read_summary("runs/x")["algorithm"] == "quiet"
    assert load_recipe("runs/x/recipe.yaml").algorithm == "quiet_trainer.py:QuietTrainer"


def test_a_registered_config_runs_its_trainer(folder: Path, tiny_model_path: Path) -> None:
    register(folder, "mixed", mixed="mixed_config:MixedConfig")
    recipe = write_recipe(folder, "mixed", model=tiny_model_path)
    assert main(["run", str(recipe), "mixer.share=0.25"]) == 0
    assert read_summary("runs/x")["algorithm"] == "quiet"
    assert share_of(load_recipe("runs/x/recipe.yaml")) == 0.25


def test_check_and_data_check_know_the_rows_of_a_plugin_by_its_config(
    folder: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(folder, "mixed_config:MixedConfig", model=tiny_model_path)
    assert main(["check", str(recipe)]) == 0
    assert main(["data", "check", str(recipe)]) == 0
    assert "8 rows" in capsys.readouterr().out


def test_check_says_so_if_it_does_not_know_an_algorithms_rows(
    folder: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.py").write_text("from rlqwen.config import TrainerConfig\nclass OwnConfig(TrainerConfig): pass\n")
    recipe = write_recipe(folder, "own.py:OwnConfig", model=tiny_model_path)
    assert main(["check", str(recipe)]) == 0
    assert "data.train was not tokenized: OwnConfig is none of" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "check", str(recipe)]) == 2
    assert "OwnConfig is none of" in capsys.readouterr().err


# Finding


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo", "grpo", "distillation"])
def test_a_built_in_algorithm_names_its_trainer_and_the_trainer_its_config(algorithm: str) -> None:
    assert trainer_class(algorithm).config_class is config_class(algorithm)
    assert trainer_class(algorithm).algorithm == algorithm


def test_a_trainer_and_its_config_may_share_a_file(folder: Path) -> None:
    (folder / "both.py").write_text(TRAINER + CONFIG.replace("quiet_trainer:QuietTrainer", "QuietTrainer"))
    assert trainer_class("both.py:MixedConfig").__name__ == "QuietTrainer"
    assert config_class("both.py:QuietTrainer") is SFTConfig
    assert config_class("both.py:MixedConfig") is config_class("both.py:MixedConfig")


def test_an_edited_file_is_imported_again(folder: Path) -> None:
    assert "mixer" in config_class("mixed_config.py:MixedConfig").model_fields
    (folder / "mixed_config.py").write_text(CONFIG.replace("mixer:", "blender_settings:"))
    assert "blender_settings" in config_class("mixed_config.py:MixedConfig").model_fields


def test_an_unknown_algorithm_suggests_the_nearest(folder: Path) -> None:
    path = write_recipe(folder, "gropo")
    assert message_of(path).startswith(
        f"{path}: algorithm: unknown algorithm 'gropo'; did you mean 'grpo'? Registered: "
    )


def test_a_name_that_two_packages_register_is_refused(folder: Path) -> None:
    register(folder, "one", mixed="mixed_config:MixedConfig")
    register(folder, "two", mixed="quiet_trainer:QuietTrainer")
    message = message_of(write_recipe(folder, "mixed"))
    assert "algorithm 'mixed' is registered by more than one package: " in message
    assert "one 1.0 (mixed_config:MixedConfig)" in message
    assert "two 1.0 (quiet_trainer:QuietTrainer)" in message


def test_what_is_neither_a_config_nor_a_trainer_is_refused(folder: Path) -> None:
    (folder / "other.py").write_text("class Trainer: pass\n")
    assert "'other.py:Trainer' (other.py) is neither a subclass of rlqwen.config.TrainerConfig" in message_of(
        write_recipe(folder, "other.py:Trainer")
    )
    assert "algorithm: must be a name, such as distillation, dpo, grpo" in message_of(write_recipe(folder, 3))


def test_a_config_without_a_trainer_says_so(folder: Path) -> None:
    (folder / "bare.py").write_text("from rlqwen.config import TrainerConfig\nclass BareConfig(TrainerConfig): pass\n")
    with pytest.raises(ConfigError, match="BareConfig names no trainer"):
        trainer_class("bare.py:BareConfig")


# Sections


def test_a_plugins_section_is_read_at_the_top_and_written_back(folder: Path) -> None:
    recipe = load_recipe(write_recipe(folder, "mixed_config:MixedConfig", mixer={"share": 0.1}))
    assert share_of(recipe) == 0.1
    write_resolved(recipe, "resolved.yaml")
    written = yaml.safe_load(Path("resolved.yaml").read_text())
    assert written["mixer"] == {"share": 0.1}
    assert "mixer" not in written["train"]
    assert load_recipe("resolved.yaml") == recipe


def test_a_section_named_like_a_key_of_the_recipe_stands_under_train(folder: Path) -> None:
    recipe = load_recipe(write_recipe(folder, "mixed_config:MixedConfig", train={"model": {"share": 0.2}}))
    write_resolved(recipe, "resolved.yaml")
    assert share_of(load_recipe("resolved.yaml"), "model") == 0.2


def test_a_section_may_also_stand_under_train_but_not_in_both_places(folder: Path) -> None:
    recipe = write_recipe(folder, "mixed_config:MixedConfig", train={"mixer": {"share": 0.1}})
    assert share_of(load_recipe(recipe)) == 0.1
    assert share_of(load_recipe(recipe, ["mixer.share=0.3"])) == 0.3
    both = write_recipe(folder, "mixed_config:MixedConfig", train={"mixer": {}}, mixer={})
    assert "mixer stands at the top of the recipe and under train" in message_of(both)


def test_an_override_finds_a_section_at_the_top_under_either_name(folder: Path) -> None:
    recipe = write_recipe(folder, "mixed_config:MixedConfig", mixer={"share": 0.1})
    assert share_of(load_recipe(recipe, ["train.mixer.share=0.4"])) == 0.4


@pytest.mark.parametrize("place", ["top", "train"])
def test_a_fault_in_a_section_is_named_by_where_it_stands(folder: Path, place: str) -> None:
    keys = {"mixer": {"share": "much"}}
    path = write_recipe(folder, "mixed_config:MixedConfig", **(keys if place == "top" else {"train": keys}))
    expected = "mixer.share: " if place == "top" else "train.mixer.share: "
    assert message_of(path).startswith(f"{path}: {expected}")


def test_a_misspelled_section_suggests_the_nearest(folder: Path) -> None:
    assert "unknown key 'mixr'; did you mean 'mixer'?" in message_of(
        write_recipe(folder, "mixed_config:MixedConfig", mixr={})
    )


def test_a_section_of_other_algorithms_is_named_with_them(folder: Path) -> None:
    message = message_of(write_recipe(folder, "sft", rollout={}))
    assert "'rollout' has no meaning for algorithm 'sft': it is a section of distillation, grpo, ppo" in message


# Overrides and rewards


def test_overrides_begin_with_the_name_of_a_plugin_algorithm(folder: Path) -> None:
    register(folder, "mixed", mixed="mixed_config:MixedConfig")
    one = load_recipe(write_recipe(folder, "mixed"), ["mixed.train.max_steps=7", "mixed.mixer.share=0.6"])
    assert (one.train.max_steps, share_of(one)) == (7, 0.6)


def test_overrides_begin_with_the_class_of_an_algorithm_in_a_file(folder: Path) -> None:
    first = write_recipe(folder, "quiet_trainer.py:QuietTrainer")
    second = write_recipe(folder, "mixed_config:MixedConfig", output_dir="runs/y").rename("second.yaml")
    first = write_recipe(folder, "quiet_trainer.py:QuietTrainer")
    recipes = load_recipes([first, second], ["QuietTrainer.train.max_steps=7"])
    assert [recipe.train.max_steps for recipe in recipes] == [7, 1]
    assert short_name("my_file.py:Mine") == "Mine"


def test_an_algorithm_that_samples_may_do_without_rewards(folder: Path) -> None:
    assert GRPOConfig.rewards == "required"
    (folder / "distill.py").write_text(
        dedent("""\
        from rlqwen.config import GRPOConfig

        class DistillConfig(GRPOConfig):
            rewards = "optional"
        """)
    )
    assert load_recipe(write_recipe(folder, "distill.py:DistillConfig")).rewards == []
    assert load_recipe(write_recipe(folder, "distill.py:DistillConfig", rewards=["accuracy"])).rewards
    assert "needs at least one reward" in message_of(write_recipe(folder, "grpo"))
    assert "takes no rewards" in message_of(write_recipe(folder, "sft", rewards=["accuracy"]))
