"""Test which rewards are pickled for workers, and whether by value or by name."""

import functools
import importlib.util
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlqwen.rewards.pickling import describe_state, pickle_function


def plain(completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


class Stateless:
    def __call__(self, completions: list[str]) -> list[float]:
        return plain(completions)

    @classmethod
    def of_the_class(cls, completions: list[str]) -> list[float]:
        return plain(completions)


class Counting(Stateless):
    def __init__(self) -> None:
        self.num_calls = 0


class Slotted(Stateless):
    __slots__ = ("num_calls",)


@dataclass(frozen=True)
class Frozen:
    scale: float

    def __call__(self, completions: list[str]) -> list[float]:
        return [self.scale] * len(completions)


@pytest.mark.parametrize(
    "function",
    [
        plain,
        lambda completions: [0.0],
        functools.partial(plain, completions=[]),
        functools.lru_cache(plain),
        functools.wraps(plain)(lambda completions: plain(completions)),
        Stateless(),
        Stateless.of_the_class,
        Frozen(2.0),
        len,
    ],
)
def test_functions_keep_no_state(function: Callable[..., Any]) -> None:
    assert describe_state(function) is None


@pytest.mark.parametrize("function", [Counting(), Counting().__call__, functools.partial(Counting()), Slotted()])
def test_objects_with_attributes_keep_state(function: Callable[..., Any]) -> None:
    assert describe_state(function) is not None


def load_file(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["only_here_rewards", "json", "package_of_none.rewards"])
def test_a_module_that_cannot_be_imported_is_pickled_by_value(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("SCALE = 3.0\ndef scaled(completions):\n    return [SCALE] * len(completions)\n")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        pickled = pickle_function(load_file(file, name).scaled)
        patch.delitem(sys.modules, name)
    assert pickle.loads(pickled)(completions=["a"]) == [3.0]


def test_a_module_that_can_be_imported_is_pickled_by_name() -> None:
    assert b"json" in pickle_function(__import__("json").dumps)
    assert len(pickle_function(__import__("json").dumps)) < 100
