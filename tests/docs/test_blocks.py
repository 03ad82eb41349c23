"""Recipes in the pages validate, Python compiles or runs, and commands parse; tests/docs/pages.py says how blocks are marked."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from rlqwen.cli import cli, main
from rlqwen.config import Recipe
from rlqwen.config.algorithms import config_class
from rlqwen.config.overrides import fits, parse_override
from rlqwen.config.recipe_yaml import list_recipes, load_recipes
from rlqwen.config.yaml_dialect import Loader
from rlqwen.data.formats import normalize_row
from rlqwen.data.preference_formats import to_labelled_rows
from rlqwen.errors import ConfigError, InputError
from rlqwen.planning import make_plan
from rlqwen.plugins.kinds import TRAINERS
from tests.docs.pages import ROOT, Block, blocks, commands, name_of, pages, write_files

PAGES = pages()


def blocks_of(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages and block.is_checked]


def recipe_faults(text: str) -> list[str]:
    """Return what is wrong with a recipe, or with a part of one, which is put into a recipe of each algorithm."""
    values = yaml.load(text, Loader)
    if not isinstance(values, dict):
        return [f"is no mapping: {values!r}"]
    if values.keys() >= {"algorithm", "model", "data", "output_dir"}:
        return _faults(values)
    algorithms = [values["algorithm"]] if "algorithm" in values else list(TRAINERS.discover())
    faults = [_faults(_completed(values, algorithm)) for algorithm in algorithms]
    return [] if [] in faults else [line for lines in faults for line in lines]


def _completed(values: dict[str, Any], algorithm: str) -> dict[str, Any]:
    """Return a whole recipe of `algorithm` that has `values`."""
    whole: dict[str, Any] = {
        "algorithm": algorithm,
        "model": {"path": "builtin:tiny-qwen3"},
        "data": {"train": {"path": "builtin:questions"}},
        "output_dir": "runs/page",
    }
    if config_class(algorithm).rewards == "required":
        whole["rewards"] = ["accuracy"]
    for key, value in values.items():
        whole[key] = whole[key] | value if isinstance(value, dict) and isinstance(whole.get(key), dict) else value
    return whole


def _faults(values: dict[str, Any]) -> list[str]:
    try:
        Recipe.parse(values, str(values["algorithm"]))
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("block", blocks_of("yaml", "yml"), ids=str)
def test_a_recipe_in_a_page_validates(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert recipe_faults(block.text) == []


def test_a_wrong_recipe_is_found() -> None:
    assert recipe_faults("train: {learning_rate: 1e-5}\nrollout: {engine: transformers}") == []
    assert "learning_rte" in recipe_faults("train: {learning_rte: 1e-5}")[0]
    assert "grpo: train.beta" in recipe_faults("algorithm: grpo\ntrain: {beta: -1}")[0]
    whole = "algorithm: grpo\nmodel: {path: a}\ndata: {train: {path: b}}\noutput_dir: c"
    assert "needs at least one reward" in recipe_faults(whole)[0]


@pytest.mark.parametrize("block", blocks_of("python"), ids=str)
def test_python_in_a_page_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_json_in_the_pages_is_json() -> None:
    for block in blocks_of("json"):
        assert json.loads(block.text) is not None, block


@pytest.mark.parametrize("block", blocks_of("jsonl"), ids=str)
def test_rows_in_a_page_are_in_a_form_that_is_read(block: Block) -> None:
    for line in block.text.splitlines():
        row = normalize_row(json.loads(line), str(block))
        assert any(form <= row.keys() for form in ({"messages"}, {"prompt"}, {"text"})), line
        if "chosen" in row:
            assert {side["label"] for side in to_labelled_rows(row, str(block))} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))], ids=name_of)
def test_python_in_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in a folder that holds the files of the page."""
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.runs:
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)  # noqa: S102
    for name in [name for name, module in sys.modules.items() if _is_in(module, tmp_path)]:
        del sys.modules[name]


def _is_in(module: Any, folder: Path) -> bool:
    return str(getattr(module, "__file__", None) or "").startswith(f"{folder}{os.sep}")


def command_fault(words: list[str]) -> str | None:
    """Return what is wrong with a command of rlqwen; None if it parses, or is another program's."""
    if "-m" in words and words[words.index("-m") + 1 :][:1] == ["rlqwen"]:
        words = words[words.index("-m") + 1 :]
    if words[0].rpartition("/")[2] != "rlqwen":
        return None
    command: click.Command = cli
    # click makes a command's help option once, by the settings of the first context that the command is parsed in.
    context = click.Context(cli, info_name="rlqwen", **cli.context_settings)
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            return f"no such command: {rest[0]}"
        context, command, rest = click.Context(found, parent=context, info_name=rest[0]), found, rest[1:]
    try:
        parsed = command.make_context(context.info_name, list(rest), parent=context.parent)
    except click.exceptions.Exit:
        return None  # --help or --version
    except click.ClickException as error:
        return error.format_message()
    if command.name == "plan":
        return plan_fault(**parsed.params)
    return recipe_words_fault(parsed.params["words"]) if "words" in parsed.params else None


def plan_fault(words: tuple[str, ...], gpus: str, layout: str | None, **options: Any) -> str | None:
    """Return what is wrong with a recipe or model, GPUs or layout of `rlqwen plan`; None if it can be planned."""
    if words[0].endswith(".yaml"):
        return recipe_words_fault(words)
    try:
        make_plan(words[0], words[1:], gpus=gpus, layout=layout)
    except InputError as error:
        return str(error)
    return None


def recipe_words_fault(words: tuple[str, ...]) -> str | None:
    """Return what is wrong with the recipes and overrides of `rlqwen run`; None if they fit."""
    overrides = [word for word in words if re.match(r"[\w.]+=", word)]
    recipes = [word for word in words if word not in overrides]
    packaged = {recipe.name for recipe in list_recipes()}
    there = [name in packaged or Path(name).is_file() or (ROOT / name).is_file() for name in recipes]
    if all(there):
        try:
            load_recipes([ROOT / name if (ROOT / name).is_file() else name for name in recipes], overrides)
        except ConfigError as error:
            return str(error)
        return None
    unknown = [name for name, found in zip(recipes, there, strict=True) if not found and Path(name).suffix != ".yaml"]
    if unknown:
        return f"neither packaged recipes nor .yaml files: {unknown}"
    algorithms = list(TRAINERS.discover())
    for text in overrides:
        override = parse_override(text, algorithms)
        if not any(fits(override, config_class(override.algorithm or name)) for name in algorithms):
            return f"no algorithm has the key of {text}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_a_page_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    faults = {place: said for place, words in commands(page) if (said := command_fault(words)) is not None}
    assert faults == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rlqwen run quickstart_sft train.max_steps=2", None),
        ("rlqwen run quickstart_sft train.max_step=2", "max_steps"),
        ("rlqwen run my.yaml train.num_generations=4", None),
        ("rlqwen run my.yaml train.num_generation=4", "no algorithm has the key"),
        ("rlqwen run quickstart_stf", "neither packaged recipes"),
        ("rlqwen runn my.yaml", "no such command"),
        ("rlqwen data check train.jsonl --evall test.jsonl", "--evall"),
        ("rlqwen eval model", "--data"),
        ("rlqwen plan Qwen/Qwen3-8B --gpus 8xH100 --layout tp=2", None),
        ("rlqwen plan Qwen/Qwen3-8B --gpus 8xH300", "no such GPU"),
        ("rlqwen plan Qwen/Qwen3-8B --layout tp=16", "makes fsdp=1 x tp=16"),
        ("rlqwen plan Qwen/Qwen3-9B", "no config of that name"),
        ("rlqwen --version", None),
        ("torchrun --nnodes 2 -m rlqwen run my.yaml --resum", "--resum"),
        ("ls --resum", None),
    ],
)
def test_a_wrong_command_is_found(line: str, said: str | None) -> None:
    found = command_fault(line.split())
    assert found is None if said is None else said in str(found)


def test_a_command_is_parsed_with_the_settings_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in cli.commands.values():
        monkeypatch.setattr(command, "_help_option", None)
        assert command_fault(["rlqwen", str(command.name), "-h"]) is None, command.name
        assert main([str(command.name), "-h"]) == 0
