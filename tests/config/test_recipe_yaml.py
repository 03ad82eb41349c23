"""Test reading recipes: YAML, overrides, names, and writing them back."""

from pathlib import Path

import pytest
import yaml

from rlqwen.config import GRPOConfig, Recipe, SFTConfig
from rlqwen.config.batch_plan import check_ranks
from rlqwen.config.recipe_yaml import (
    PackagedRecipe,
    copy_recipe,
    find_recipe,
    list_recipes,
    load_recipe,
    load_recipes,
    write_resolved,
)
from rlqwen.errors import ConfigError
from tests.narrowing import only_source

SFT = """\
algorithm: sft
model: {path: builtin:tiny-qwen3}
data:
  train: {path: rows.jsonl}
train:
  learning_rate: 1e-3
output_dir: runs/sft
"""
GRPO = """\
algorithm: grpo
model: {path: runs/sft/final, lora: {r: 8}}
data:
  train: [{path: a.jsonl, weight: 2}, {generator: arithmetic, args: {size: 4}}]
rewards: [accuracy, {name: length, weight: 0.5}]
rollout: {num_workers: 2}
train: {num_generations: 4}
output_dir: runs/grpo
"""


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    path = tmp_path / "sft.yaml"
    path.write_text(SFT)
    return path


@pytest.fixture
def grpo(tmp_path: Path) -> Path:
    path = tmp_path / "grpo.yaml"
    path.write_text(GRPO)
    return path


def message_of(*paths: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipes(paths, overrides)
    return str(caught.value)


def edited(path: Path, old: str, new: str) -> Path:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return path


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_every_shipped_recipe_parses_and_round_trips(recipe: PackagedRecipe, tmp_path: Path) -> None:
    loaded = load_recipe(recipe.name)
    assert recipe.description
    write_resolved(loaded, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == loaded


def test_shipped_recipes_include_the_quickstart() -> None:
    assert {"quickstart_sft", "quickstart_grpo"} <= {recipe.name for recipe in list_recipes()}


def test_sections_at_the_top_reach_the_trainer_config(grpo: Path) -> None:
    recipe = load_recipe(grpo)
    assert isinstance(recipe.train, GRPOConfig)
    assert recipe.train.rollout.num_workers == 2
    assert recipe.train.output_dir == recipe.output_dir == "runs/grpo"
    assert [reward.name for reward in recipe.rewards] == ["accuracy", "length"]


def test_resolved_recipe_keeps_sections_at_the_top_and_fills_defaults(grpo: Path, tmp_path: Path) -> None:
    write_resolved(load_recipe(grpo), tmp_path / "out.yaml")
    text = (tmp_path / "out.yaml").read_text()
    assert yaml.safe_load(text)["rollout"]["num_workers"] == 2
    assert "\n  max_completion_length: 512\n" in text
    assert text.count("output_dir: runs/grpo") == 1


def test_unset_source_weights_stay_unset_in_the_resolved_recipe(grpo: Path, tmp_path: Path) -> None:
    """Weights make a mixture by shares, but sources without any are used whole."""
    write_resolved(load_recipe(grpo), tmp_path / "out.yaml")
    sources = load_recipe(tmp_path / "out.yaml").data.train
    assert isinstance(sources, list)
    assert [source.weight for source in sources] == [2.0, None]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("3.5e-2", 0.035), ("2.5", 2.5), ("-.5e1", -5.0)],
)
def test_floats_without_a_decimal_point_are_numbers_in_overrides_and_files(sft: Path, text: str, value: float) -> None:
    override = load_recipe(sft, [f"data.train.args={{x: {text}}}"])
    assert only_source(override.data.train).args == {"x": value}
    edited(sft, "path: rows.jsonl", f"path: rows.jsonl, args: {{x: {text}}}")
    assert only_source(load_recipe(sft).data.train).args == {"x": value}


def test_strings_that_look_like_floats_survive_the_round_trip(sft: Path, tmp_path: Path) -> None:
    recipe = load_recipe(sft, ['model.revision="1e-4"', 'train.run_name="no"'])
    write_resolved(recipe, tmp_path / "out.yaml")
    again = load_recipe(tmp_path / "out.yaml")
    assert (again.model.revision, again.train.run_name) == ("1e-4", "no")


def test_overrides_reach_nested_keys_list_items_and_null(grpo: Path) -> None:
    recipe = load_recipe(
        grpo,
        ["rewards.0.weight=2", "model.lora=null", "data.train.1.args.size=9", "data.eval.path=b.jsonl", "rollout={}"],
    )
    assert recipe.rewards[0].weight == 2.0
    assert recipe.model.lora is None
    assert isinstance(recipe.data.train, list)
    assert recipe.data.train[1].args == {"size": 9}
    assert only_source(recipe.data.eval).path == "b.jsonl"
    assert isinstance(recipe.train, GRPOConfig)
    assert recipe.train.rollout.num_workers is None


def test_an_unquoted_no_is_the_strategy_no(sft: Path) -> None:
    assert load_recipe(sft, ["train.save_strategy=no"]).train.save_strategy == "no"


def test_an_override_goes_to_the_recipes_that_have_its_key(sft: Path, grpo: Path) -> None:
    first, second = load_recipes([sft, grpo], ["train.max_steps=3", "train.num_generations=2", "rollout.num_workers=1"])
    assert isinstance(first.train, SFTConfig)
    assert isinstance(second.train, GRPOConfig)
    assert (first.train.max_steps, second.train.max_steps) == (3, 3)
    assert second.train.num_generations == 2
    assert second.train.rollout.num_workers == 1


def test_an_override_that_begins_with_an_algorithm_goes_to_it_alone(sft: Path, grpo: Path) -> None:
    first, second = load_recipes([sft, grpo], ["sft.train.max_steps=3", "grpo.train.max_steps=5"])
    assert (first.train.max_steps, second.train.max_steps) == (3, 5)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.learning_rat=1", ["override 'train.learning_rat=1'", "did you mean 'learning_rate'", "value given: 1"]),
        ("train.lr=1", ["did you mean 'learning_rate'"]),
        ("train.max_steps=many", ["override 'train.max_steps=many'", "train.max_steps:", "'many'"]),
        ("data.train.pth=a", ["data.train: unknown key 'pth'; did you mean 'path'"]),
        ("nonsense=1", ["override 'nonsense=1'", "unknown key 'nonsense'"]),
        ("grpo.train.max_steps=1", ["fits no recipe", "sft"]),
        ("sft=1", ["names an algorithm and no key"]),
        ("train.max_steps", ["not of the form key.path=value"]),
        ("train.run_name={a", ["is not YAML"]),
        ("data.train.path.x=1", ["'data.train.path' is 'rows.jsonl'"]),
        ("rollout.num_workers=1", ["'rollout' has no meaning for algorithm 'sft'"]),
    ],
)
def test_a_bad_override_is_named_with_its_value(sft: Path, override: str, parts: list[str]) -> None:
    message = message_of(sft, overrides=(override,))
    for part in parts:
        assert part in message


def test_an_index_outside_a_list_is_refused(grpo: Path) -> None:
    assert "'rewards' is a list of 2" in message_of(grpo, overrides=("rewards.2.weight=1",))


def test_a_fault_in_the_file_names_file_and_key_path(grpo: Path) -> None:
    message = message_of(edited(grpo, "num_generations: 4", "epsilon: wide"))
    assert message.startswith(f"{grpo}: train.epsilon: ")
    assert "'wide'" in message


def test_a_batch_that_does_not_divide_is_refused(grpo: Path) -> None:
    recipe = load_recipe(grpo, ("train.num_generations=7",))
    with pytest.raises(ConfigError, match=r"runs/grpo \(grpo\): 8 .* do not divide into groups of num_generations=7"):
        check_ranks(recipe, 1)
    check_ranks(recipe, 7)


def test_broken_yaml_names_the_line(sft: Path) -> None:
    assert message_of(edited(sft, "output_dir: runs/sft", "output_dir: [runs")).startswith(f"{sft}:8: ")


def test_a_duplicate_key_is_refused_with_both_lines(sft: Path) -> None:
    message = message_of(edited(sft, "output_dir:", "algorithm: grpo\noutput_dir:"))
    assert message == f"{sft}:7: key 'algorithm' is given twice, first on line 1"


@pytest.mark.parametrize(
    ("text", "found"), [("", "an empty file"), ("- a", "a list"), ("? [a]\n: b", "cannot be a key")]
)
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert found in message_of(path)


def test_two_recipes_may_not_share_a_run_folder(sft: Path, grpo: Path) -> None:
    assert "'runs/x' is the run folder of" in message_of(sft, grpo, overrides=("output_dir=runs/x",))


def test_an_unknown_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'quickstart_sft'?" in message_of(Path("quikstart_sft"))
    assert "is a folder" in message_of(tmp_path)


def test_a_file_wins_over_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("quickstart_sft").is_absolute()
    Path("quickstart_sft").write_text(SFT)
    assert find_recipe("quickstart_sft") == Path("quickstart_sft")


def test_copy_goes_into_a_folder_or_a_file_and_never_overwrites(tmp_path: Path) -> None:
    copied = copy_recipe("quickstart_sft", tmp_path / "new")
    assert copied == tmp_path / "new" / "quickstart_sft.yaml"
    assert isinstance(load_recipe(copied), Recipe)
    assert copy_recipe("quickstart_sft", tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    with pytest.raises(ConfigError, match="exists already"):
        copy_recipe("quickstart_sft", tmp_path / "mine.yaml")


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_a_copied_recipe_does_not_overwrite_runs(recipe: PackagedRecipe, tmp_path: Path) -> None:
    copied = load_recipe(copy_recipe(recipe.name, tmp_path))
    assert not copied.train.overwrite_output_dir
    shipped = load_recipe(recipe.name)
    assert copied.train.model_copy(update={"overwrite_output_dir": shipped.train.overwrite_output_dir}) == shipped.train


def test_an_override_of_the_model_path_does_not_reach_later_stages(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    data = "data: {train: {generator: arithmetic}}"
    first.write_text(f"algorithm: sft\nmodel: {{path: a}}\n{data}\noutput_dir: runs/one\n")
    second.write_text(
        f"algorithm: grpo\nmodel: {{path: runs/one/final}}\n{data}\nrewards: [accuracy]\noutput_dir: runs/two\n"
    )
    with pytest.warns(UserWarning, match=r"model\.path=b does not reach the grpo recipe.*runs/one/final"):
        recipes = load_recipes([first, second], ["model.path=b"])
    assert [recipe.model.path for recipe in recipes] == ["b", "runs/one/final"]
    assert load_recipes([first, second], ["grpo.model.path=c"])[1].model.path == "c"
    assert load_recipe(second, ["model.path=c"]).model.path == "c"


def test_a_run_folder_under_train_is_refused_unless_it_is_the_same(sft: Path) -> None:
    with pytest.raises(ConfigError, match=r"give output_dir=elsewhere instead"):
        load_recipe(sft, ["train.output_dir=elsewhere"])
    same = load_recipe(sft).output_dir
    assert load_recipe(sft, [f"train.output_dir={same}"]).train.output_dir == same
