"""The reference of recipes, which docs/generate_reference.py writes when the site is built, leaves nothing out."""

import rlqwen.config
from docs.generate_reference import HEADINGS, MARKER, reference
from rlqwen.config.algorithms import config_class
from rlqwen.config.base import Config
from rlqwen.plugins.kinds import TRAINERS
from tests.docs.pages import ROOT


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
