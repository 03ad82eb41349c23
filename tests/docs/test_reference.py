"""The reference of recipes, which docs/generate_reference.py writes when the site is built, leaves nothing out; nor does
the table of built-in rewards."""

import inspect
import re

import rlqwen.config
from docs.generate_reference import HEADINGS, MARKER, reference
from rlqwen.config.algorithms import config_class
from rlqwen.config.base import Config
from rlqwen.plugins.kinds import REWARDS, TRAINERS
from tests.docs.pages import ROOT

_OF_THE_CALL = {"completions", "prompts", "completion_ids", "columns"}


def test_every_config_model_has_a_section() -> None:
    models = {getattr(rlqwen.config, name) for name in rlqwen.config.__all__} - {Config}
    algorithms = {config_class(name) for name in TRAINERS.discover()}
    assert models | algorithms <= set(HEADINGS)


def test_every_key_of_every_model_has_a_row_with_a_meaning() -> None:
    text = reference()
    for model in HEADINGS:
        for key, field in model.model_fields.items():
            assert f"\n| `{key}` | " in text, f"{model.__name__}.{key}"
            assert field.description, f"{model.__name__}.{key} has no docstring"


def test_the_page_says_where_the_tables_go() -> None:
    assert (ROOT / "docs" / "reference" / "recipes.md").read_text("utf-8").count(MARKER) == 1


def test_the_table_of_built_in_rewards_has_their_names_and_arguments() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text("utf-8")
    table = page.partition("## Built-in rewards")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*)\|$", table, re.MULTILINE)
    shown = {name: set(re.findall(r"`(\w+)`", arguments)) for name, arguments in rows}
    built_in = [name for name, entry in REWARDS.discover().items() if entry.origin.startswith("rlqwen ")]
    assert shown == {name: set(inspect.signature(REWARDS.load(name)).parameters) - _OF_THE_CALL for name in built_in}
