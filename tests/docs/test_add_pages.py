"""Run the code that the pages of docs/add show, as a reader would: files in a folder, and a recipe that names them."""

import json
import re
from pathlib import Path

import pytest

from rlqwen.cli import main
from tests.docs.pages import ROOT, write_files

DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "add").glob("*.md"))
METRICS = {
    "loss": "soft_clip/ratio_max",
    "advantage": "loss",
    "engine": "sampling/logp_gap",
    "trainer": "loss",
    "reward": "reward/digits/mean",
}


def test_every_kind_of_plugin_has_a_page() -> None:
    assert {page.stem for page in PAGES} >= {"loss", "advantage", "trainer", "engine", "model-family", "reward"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short(page: Path) -> None:
    assert len(page.read_text("utf-8").splitlines()) < 80


@pytest.mark.parametrize("name", METRICS)
def test_the_recipe_of_a_page_trains_with_the_files_of_the_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(DOCS / "add" / f"{name}.md", tmp_path)
    assert main(["run", "recipe.yaml"]) == 0
    (run,) = Path("runs").iterdir()
    logged = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(logged) == 2
    assert METRICS[name] in logged[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_files_of_rlqwen_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    paths = re.findall(r"`((?:rlqwen|tests|recipes)/[\w./-]*|[\w-]+\.(?:toml|md))`", text)
    assert paths
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
