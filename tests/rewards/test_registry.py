import asyncio
import functools
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlqwen.errors import RewardSpecError
from rlqwen.plugins.registry import PluginEntry
from rlqwen.rewards.registry import (
    REWARDS,
    call_arguments,
    check_columns,
    resolve,
    unique_names,
)

PLUGINS = Path(__file__).parents[1] / "plugins"
BUILT_IN = {
    "accuracy",
    "boxed_format",
    "cosine_length",
    "exact_match",
    "format",
    "language",
    "length",
    "repetition",
    "soft_overlong",
    "tag_count",
}


def good(completions: list[str], solution: list[str], bonus: float = 0.0, **columns: Any) -> list[float]:
    """Say how long."""
    return [len(one) + bonus for one in completions]


def run_python(code: str, *search: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(plugin: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(target), str(PLUGINS / plugin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def digits_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    install("rlqwen-reward-digits", target)
    return target


@pytest.fixture(scope="module")
def rival_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("rival")
    install("rlqwen-reward-digits-rival", target)
    return target


def test_built_in_rewards_have_an_origin_and_a_line_of_documentation() -> None:
    entries = REWARDS.discover()
    assert set(entries) >= BUILT_IN
    version = importlib.metadata.version("rlqwen")
    for name in BUILT_IN:
        assert entries[name].origin == f"rlqwen {version}"
        assert entries[name].conflict is None
        assert entries[name].doc
        assert callable(REWARDS.load(name))


def test_discover_imports_neither_rewards_nor_torch() -> None:
    code = """
import sys
from rlqwen.rewards.registry import REWARDS
docs = [entry.doc for entry in REWARDS.discover().values()]
assert all(docs)
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "sympy", "math_verify", "rlqwen_rewards"}))
"""
    assert run_python(code).strip() == "[]"


def test_loading_one_reward_imports_no_other() -> None:
    code = """
import sys
from rlqwen.rewards.registry import REWARDS
REWARDS.load("length")
print(sorted(name for name in sys.modules if name.startswith("rlqwen_rewards") or name == "sympy"))
"""
    assert run_python(code).strip() == "['rlqwen_rewards', 'rlqwen_rewards.answers', 'rlqwen_rewards.length']"


def test_a_reward_of_another_package_is_found_by_name(digits_package: Path) -> None:
    code = """
import json
from rlqwen.rewards.registry import call_arguments, check_columns, REWARDS, resolve
entry = REWARDS.discover()["digits"]
reward = resolve("digits", {"scale": 2.0})
check_columns(reward, ["prompt", "solution"], "the data")
completions = [[{"role": "assistant", "content": text}] for text in (r"\\\\boxed{57}", r"\\\\boxed{47}", "57")]
arguments = call_arguments(reward, ["50+7="] * 3, completions, [[1]] * 3, {"solution": ["57"] * 3, "level": [1] * 3})
print(json.dumps([entry.origin, entry.doc, reward.name, reward.origin, reward.function(**arguments)]))
"""
    origin, doc, name, reward_origin, rewards = json.loads(run_python(code, digits_package))
    assert origin == reward_origin == "rlqwen-reward-digits 1.2.0"
    assert doc.startswith("Score the share of the solution's digits")
    assert name == "digits"
    assert rewards == [2.0, 1.0, 0.0]


def test_a_name_claimed_by_two_packages_is_an_error_that_names_both(digits_package: Path, rival_package: Path) -> None:
    code = """
from rlqwen.errors import RewardSpecError
from rlqwen.rewards.registry import REWARDS, resolve
assert "digits" in REWARDS.discover() and "accuracy" in REWARDS.discover()
try:
    resolve("digits")
except RewardSpecError as error:
    assert str(error) == REWARDS.discover()["digits"].conflict
    print(error)
assert resolve("rlqwen_reward_digits_rival:num_digits").function(["a1b2"]) == [2.0]
"""
    message = run_python(code, digits_package, rival_package)
    assert "reward 'digits' is registered by more than one package" in message
    assert "rlqwen-reward-digits 1.2.0 (rlqwen_reward_digits:digits)" in message
    assert "rlqwen-reward-digits-rival 0.1.0 (rlqwen_reward_digits_rival:num_digits)" in message
    assert "uninstall one" in message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", r"unknown reward 'acuracy'; did you mean 'accuracy'\? Registered: .*boxed_format"),
        ("zzz", r"unknown reward 'zzz'\. Registered: .*Also accepted: package.module:function"),
        ("rewards.py", "name the function too: rewards.py:function"),
        (
            "no_such_package.mod:fn",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'; install",
        ),
        ("json:dumpz", "module 'json' has no 'dumpz'; did you mean 'dump"),
        ("math:pi", "reward 'pi' .math. is not callable: it is a float"),
        ("no/such/file.py:fn", "there is no file 'no/such/file.py'"),
        (7, "a name or a callable .value given: 7"),
        ("math:sqrt", "parameter 'x' is positional-only"),
    ],
)
def test_an_unknown_reward_is_refused_with_a_hint(spec: Any, message: str) -> None:
    with pytest.raises(RewardSpecError, match=message):
        resolve(spec)


def test_a_function_is_loaded_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Box:\n"
        "    size: 'int' = 3\n"
        "def reward(completions, **columns):\n"
        "    return [float(Box().size)] * len(completions)\n"
    )
    reward = resolve(f"{file}:reward")
    assert (reward.name, reward.origin) == ("reward", str(file))
    assert reward.function(completions=["a", "b"]) == [3.0, 3.0]
    assert REWARDS.load(f"{file}:Box").__name__ == "Box"
    with pytest.raises(RewardSpecError, match="has no 'rewad'; did you mean 'reward'"):
        resolve(f"{file}:rewad")


def test_a_file_that_fails_to_import_names_the_cause(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('no license')\n")
    before = set(sys.modules)
    with pytest.raises(RewardSpecError, match="cannot be imported: RuntimeError: no license") as caught:
        resolve(f"{file}:reward")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not [name for name in set(sys.modules) - before if name.startswith("broken_")]


def test_every_kind_of_callable_has_a_name() -> None:
    class Judge:
        def __call__(self, completions: list[str]) -> list[float]:
            return [0.0] * len(completions)

    assert resolve(good).name == "good"
    assert resolve(functools.partial(functools.partial(good, bonus=1), solution="x")).name == "good"
    assert resolve(lambda completions: [0.0]).name == "lambda"
    assert resolve(Judge()).name == "Judge"
    assert unique_names(["a", "a", "a_2", "b", "a"]) == ["a", "a_3", "a_2", "b", "a_4"]


def test_the_signature_determines_the_parameters_of_a_reward() -> None:
    reward = resolve(good)
    assert reward.parameters == ("completions", "solution", "bonus")
    assert reward.required == ("completions", "solution")
    assert reward.accepts_any_column
    assert not reward.is_async
    assert resolve(lambda completion_ids: []).parameters == ("completion_ids",)
    assert not resolve(lambda completion_ids: []).accepts_any_column


def test_coroutine_functions_are_recognized() -> None:
    async def judge(completions: list[str], k: int = 1) -> list[float]:
        return [float(k)] * len(completions)

    class Judge:
        async def __call__(self, completions: list[str]) -> list[float]:
            return [0.0] * len(completions)

    bound = resolve(judge, {"k": 2})
    assert bound.is_async
    assert asyncio.run(bound.function(completions=["a"])) == [2.0]
    assert resolve(Judge()).is_async


def test_args_are_bound_to_a_function_and_hide_columns_of_that_name() -> None:
    reward = resolve(good, {"bonus": 0.5})
    assert reward.function(completions=["ab"], solution=["x"]) == [2.5]
    arguments = call_arguments(reward, ["p"], ["ab"], [[1]], {"solution": ["x"], "bonus": ["a column"], "other": [0]})
    assert arguments == {
        "prompts": ["p"],
        "completions": ["ab"],
        "completion_ids": [[1]],
        "solution": ["x"],
        "other": [0],
    }
    with pytest.raises(RewardSpecError, match="has no argument 'bonsu'; did you mean 'bonus'"):
        resolve(good, {"bonsu": 1})
    with pytest.raises(RewardSpecError, match="has no argument 'completions'"):
        resolve(good, {"completions": 1})


def test_args_are_passed_to_a_factory() -> None:
    def factory(k: int, flavoring: str = "plain") -> Callable[[Any], list[float]]:
        if k < 0:
            raise ValueError(f"k must not be negative, not {k}")
        return lambda completions: [float(k)] * len(completions)

    reward = resolve(factory, {"k": 3})
    assert reward.name == "factory"
    assert reward.function(completions=["a"]) == [3.0]
    with pytest.raises(RewardSpecError, match="reward 'factory' needs args: k"):
        resolve(factory, {"flavoring": "sweet"})
    with pytest.raises(RewardSpecError, match="has no argument 'flavour'; did you mean 'flavoring'"):
        resolve(factory, {"k": 1, "flavour": "sweet"})
    with pytest.raises(RewardSpecError, match=r"refuses args \{'k': -1\}: ValueError: k must not be negative, not -1"):
        resolve(factory, {"k": -1})
    with pytest.raises(RewardSpecError, match=r"takes none of .* call it and pass what it returns"):
        resolve(factory)


def test_a_factory_must_return_a_reward_function() -> None:
    with pytest.raises(RewardSpecError, match="what it returns is not a reward function: 3"):
        resolve(lambda k: k, {"k": 3})
    with pytest.raises(RewardSpecError, match="what it returns is not a reward function: <function"):
        resolve(lambda k: lambda text: 0.0, {"k": 3})


def test_built_in_rewards_refuse_invalid_args() -> None:
    assert resolve("format", {"require": ["boxed"]}).function(completions=[r"\boxed{1}"]) == [1.0]
    with pytest.raises(RewardSpecError, match="reward 'length' needs args: budget"):
        resolve("length")
    with pytest.raises(RewardSpecError, match=r"refuses args .*known parts: think, answer, boxed"):
        resolve("format", {"require": "box"})


def test_a_missing_required_column_is_refused() -> None:
    check_columns(resolve(good), ["prompt", "solution"], "train.jsonl")
    with pytest.raises(RewardSpecError) as caught:
        check_columns(resolve(good), ["question", "answer"], "train.jsonl")
    assert str(caught.value) == (
        f"reward 'good' ({__name__}) needs a column 'solution', which train.jsonl lacks; columns there: answer, "
        "question. If one of them is meant, map it in the recipe: data.train.columns: {solution: name_of_that_column}"
    )


def test_arguments_that_only_trl_passes_need_a_default() -> None:
    check_columns(resolve(lambda completions, trainer_state=None, log_extra=None, log_metric=None: []), [], "d")
    with pytest.raises(RewardSpecError, match="requires 'log_metric', which TRL's trainer passes"):
        check_columns(resolve(lambda completions, log_metric: []), [], "d")


def test_one_of_several_columns_is_required() -> None:
    check_columns(resolve("accuracy"), ["answer"], "d")
    check_columns(resolve("accuracy"), ["solution"], "d")
    with pytest.raises(RewardSpecError, match="needs a column 'solution' or 'answer', which d lacks; columns there: x"):
        check_columns(resolve("accuracy"), ["x"], "d")
    check_columns(resolve("length", {"budget": 9}), [], "d")
    with pytest.raises(RewardSpecError, match="columns there: none"):
        check_columns(resolve("length", {"budget": 9, "only_correct": True}), [], "d")


def test_only_named_arguments_are_passed() -> None:
    columns = {"solution": ["1"], "level": [3]}
    named = call_arguments(resolve(lambda completions, level=None: []), ["p"], ["c"], [[1]], columns)
    assert named == {"completions": ["c"], "level": [3]}
    everything = call_arguments(resolve(lambda **columns: []), ["p"], ["c"], [[1]], columns | {"prompts": ["theirs"]})
    assert everything == {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1]], **columns}


def test_entries_and_rewards_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(REWARDS.discover()["accuracy"])) == REWARDS.discover()["accuracy"]
    assert pickle.loads(pickle.dumps(resolve("accuracy"))) == resolve("accuracy")


@pytest.mark.parametrize("value", ["no_such_module_at_all:fn", "json.no_such:fn", "math:sqrt"])
def test_doc_without_a_source_is_empty(value: str) -> None:
    assert PluginEntry("x", value, "d", "1").doc == ""


def test_doc_of_an_unknown_attribute_is_that_of_the_module() -> None:
    assert PluginEntry("x", "json:no_such_function", "d", "1").doc.startswith("JSON (JavaScript Object Notation)")
