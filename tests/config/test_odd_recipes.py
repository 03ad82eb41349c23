"""Test that a recipe of any content is read, or refused in a message that names the key and fits a screen."""

import random
import re
import warnings
from pathlib import Path

import pytest

from rlqwen.config import GRPOConfig, SFTConfig
from rlqwen.config.recipe_yaml import load_recipe, load_recipes, write_resolved
from rlqwen.errors import ConfigError, InputError, quoted
from tests.odd_recipes import odd_recipe, recipe_texts

SFT = """\
algorithm: sft
model: {path: builtin:tiny-qwen3}
data: {train: {path: rows.jsonl}}
train: {learning_rate: 1e-3}
output_dir: runs/sft
"""


def message_of(folder: Path, text: str, *overrides: str) -> str:
    """Return the message that refuses a recipe, without the name of its file."""
    path = folder / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        load_recipes([path], overrides)
    assert_fits_screen(str(caught.value))
    return str(caught.value).replace(str(path), "r.yaml")


def assert_fits_screen(message: str) -> None:
    lines = message.splitlines()
    assert message.strip()
    assert len(lines) <= 31
    assert max(map(len, lines)) <= 2600
    quotations = re.findall(r"(?<!\w)'(?:[^'\\\n]|\\.)*'(?!\w)", message)
    assert all(len(quotation) < 230 for quotation in quotations), message[:1000]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("1e-3", ".nan", "r.yaml:4: train.learning_rate: must be a finite number (value given: '.nan')"),
        ("1e-3", "-.inf", "train.learning_rate: must be a finite number"),
        ("1e-3", "1e999", "train.learning_rate: must be a finite number"),
        ("learning_rate: 1e-3", "seed: " + "7" * 5000, "train.seed: cannot be read as int (value given: '777"),
        ("learning_rate: 1e-3", "seed: " + "7" * 50, "train.seed: must fit into 64 bits"),
        ("learning_rate: 1e-3", "seed: 0x" + "f" * 5000, "train.seed: must fit into 64 bits"),
        ("learning_rate: 1e-3", "seed: 4294967296", "train.seed: input should be less than 4294967296"),
        ("learning_rate: 1e-3", "seed: -1", "train.seed: input should be greater than or equal to 0"),
        ("learning_rate: 1e-3", "max_steps: 010", "train.max_steps: YAML 1.1 reads 010 as 8, in base 8: quote it"),
        ("learning_rate: 1e-3", "max_steps: 1:30", "train.max_steps: YAML 1.1 reads 1:30 as 90, in base 60"),
        ("learning_rate: 1e-3", "run_name: 1:30.5", "train.run_name: YAML 1.1 reads 1:30.5 as 90.5, in base 60"),
        ("learning_rate: 1e-3", "1.5: 2", "train: '1.5' cannot be a key"),
        ("learning_rate: 1e-3", "on: 2", "train: 'on' cannot be a key"),
        ("learning_rate: 1e-3", "? [a]\n: 1", "r.yaml:"),
        ("builtin:tiny-qwen3", '"a\\0b"', "model.path: must not hold the character NUL (value given: 'a\\x00b')"),
        ("builtin:tiny-qwen3", '"\\ud800"', "model.path: is not valid Unicode"),
        ("builtin:tiny-qwen3", "a" * 300, "model.path: too long for a path: 300 characters"),
        ("builtin:tiny-qwen3", "a/" * 3000, "model.path: too long for a path: 6,000 characters"),
        ("builtin:tiny-qwen3", '""', "model.path: must not be empty"),
        ("builtin:tiny-qwen3", "~nobody-here/x", "model.path: there is no user of that name here"),
        ("rows.jsonl", "$RLQWEN_NOT_SET/x", "data.train.path: the environment variable 'RLQWEN_NOT_SET' is not set"),
        ("algorithm: sft", "algorithm: [sft]", "algorithm: must be a name"),
        ("algorithm: sft", "algorithm: {a: b}", "algorithm: must be a name"),
        ("algorithm: sft", "algorithm: " + "s" * 9000, "algorithm: unknown algorithm 'sss"),
        ("{learning_rate: 1e-3}", "5", "train: must be a mapping of arguments"),
        ("{learning_rate: 1e-3}", "{parallel: 5}", "train.parallel: input should be a valid dictionary"),
        ("{path: builtin:tiny-qwen3}", "[]", "model: input should be a valid dictionary"),
        ("{learning_rate: 1e-3}", "{? " + "a" * 9000 + " : 1}", "unknown key 'aaa"),
        ("{learning_rate: 1e-3}", "[" * 3000, "nested more than 50 levels deep"),
        ("{learning_rate: 1e-3}", "[" * 60 + "]" * 60, "train.0.0: nested more than 50 levels deep"),
        ("{learning_rate: 1e-3}", "&a {x: *a}", "train.x: an alias of what it stands in"),
        ("{learning_rate: 1e-3}", "!!python/object:os.system {}", "train: 'python/object:os.system' is not a type"),
        ("{learning_rate: 1e-3}", "!!set {a}", "train: 'set' is not a type that a recipe can hold"),
        ("1e-3", "!!int x", "train.learning_rate: cannot be read as int (value given: 'x')"),
        ("1e-3", "!!bool maybe", "train.learning_rate: cannot be read as bool"),
        ("1e-3", "a\0b", "r.yaml: the character 0x0000 on line 4 is not allowed in YAML"),
        ("algorithm: sft", "\ud800", "not valid UTF-8 (byte 0)"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_key(tmp_path: Path, old: str, new: str, found: str) -> None:
    assert old in SFT
    assert found in message_of(tmp_path, SFT.replace(old, new))


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path) -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    bomb = "l0: &l0 [" + ", ".join(["x"] * 9) + "]\n" + "\n".join(levels) + "\n"
    assert "more than 100,000 values, those of aliases counted again" in message_of(tmp_path, bomb + SFT)
    merges = "".join(f"m{n}: &m{n}\n  <<: [{', '.join([f'*m{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert "more than 100,000 values" in message_of(tmp_path, "m0: &m0 {a: 1}\n" + merges + SFT)


def test_free_form_mappings_hold_no_infinity_either(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs\.a\.1: must be a finite number \(value given: inf\)"):
        SFTConfig(lr_scheduler_kwargs={"a": [1, float("inf")]})
    with pytest.raises(ConfigError, match="seed: must fit into 64 bits"):
        SFTConfig(seed=10**5000)
    with pytest.raises(ConfigError, match=r"reward_weights\.0: must be a finite number"):
        GRPOConfig(reward_weights=[float("nan")])
    itself: dict[str, object] = {}
    itself["a"] = itself
    with pytest.raises(ConfigError, match="or holds itself"):
        SFTConfig(lr_scheduler_kwargs=itself)


def test_home_and_variables_are_expanded_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RLQWEN_SCRATCH", "/scratch/me")
    path = tmp_path / "r.yaml"
    text = SFT.replace("rows.jsonl", "$HOME/rows.jsonl").replace("runs/sft", "~/runs/sft")
    path.write_text(text.replace("builtin:tiny-qwen3", "'${RLQWEN_SCRATCH}/model$'"))
    recipe = load_recipe(path)
    assert recipe.output_dir == recipe.train.output_dir == f"{tmp_path}/runs/sft"
    assert recipe.data.model_dump()["train"]["path"] == f"{tmp_path}/rows.jsonl"
    assert recipe.model.path == "/scratch/me/model$"
    assert SFTConfig(output_dir="~").output_dir == str(tmp_path)


def test_a_date_is_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(SFT.replace("learning_rate: 1e-3", "run_name: 2026-11-28, max_steps: 1_000"))
    recipe = load_recipe(path)
    assert (recipe.train.run_name, recipe.train.max_steps) == ("2026-11-28", 1000)
    write_resolved(recipe, path)
    assert load_recipe(path) == recipe


def test_overrides_of_any_text_are_refused_in_a_line(tmp_path: Path) -> None:
    for value in ("[" * 3000, ".nan", "010", "7" * 5000, '"\\0"', "!!int x", "a: b: c", "\udcff", "&a [*a]"):
        message = message_of(tmp_path, SFT, f"train.run_name={value}")
        assert "train.run_name" in message
    assert "is neither a file nor a packaged recipe" in str(refused_name("a" * 5000))
    assert "is neither a file nor a packaged recipe" in str(refused_name("a\0b"))


def refused_name(name: str) -> Exception:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name)
    return caught.value


def test_a_file_that_is_too_large_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("# " + "x" * (1 << 18))
    with pytest.raises(ConfigError, match=r"big\.yaml: 262,146 bytes, and a recipe has at most 262,144"):
        load_recipe(tmp_path / "big.yaml")


def test_messages_quote_only_the_beginning_and_the_end_of_a_value() -> None:
    assert quoted("a" * 100_000) == "'" + "a" * 139 + "..." + "a" * 49 + "'"
    assert quoted(10**5000) == "a number of 16,610 bits"
    assert quoted([10**5000]) == "a list"
    assert quoted({"a": [1, None]}) == "{'a': [1, None]}"
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert len(quoted(deep)) < 50
    message = str(ConfigError(f"a {'x' * 10_000!r} b\n" + "line\n" * 100))
    assert message.startswith("a 'xxx")
    assert message.endswith("... and 71 lines more")
    assert_fits_screen(message)
    assert str(ConfigError(message)) == message


def survive_odd_recipes(folder: Path, *, seed: int, count: int) -> int:
    """Read `count` odd recipes; return how many are accepted. Fails for any error but a refusal that fits a screen."""
    rng, texts, accepted = random.Random(seed), recipe_texts(), 0
    for number in range(count):
        text = odd_recipe(rng, texts)
        path = folder / "odd.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recipe = load_recipe(path)
        except InputError as error:
            assert_fits_screen(str(error))
            continue
        except Exception as error:
            raise AssertionError(f"recipe {number} of seed {seed} raises {error!r}: {text[:2000]}") from error
        accepted += 1
        write_resolved(recipe, folder / "resolved.yaml")
        assert load_recipe(folder / "resolved.yaml") == recipe
    return accepted


def test_odd_recipes_are_read_or_refused(tmp_path: Path) -> None:
    accepted = survive_odd_recipes(tmp_path, seed=13, count=80)
    assert 0 < accepted < 80


@pytest.mark.fault(
    "3,000 recipes with random values and characters", "each is read, or refused in a message that fits a screen"
)
def test_many_odd_recipes_are_read_or_refused(tmp_path: Path) -> None:
    accepted = sum(survive_odd_recipes(tmp_path, seed=seed, count=500) for seed in range(6))
    assert 0 < accepted < 3000


def test_only_what_is_quoted_is_cut() -> None:
    """Text between two short quotations is the message's own, and an apostrophe quotes nothing."""
    text = f"vLLM's 'one' and {'more ' * 60}of the workers' lists, for example 'two'"
    assert str(ConfigError(text)) == text
    assert (
        str(ConfigError(f"model's path: {'x' * 250!r} is none")) == f"model's path: '{'x' * 139}...{'x' * 49}' is none"
    )
