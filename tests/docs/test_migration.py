"""The tables of docs/migration.md name keys that recipes have, and names that TRL has."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from rlqwen.cli import cli
from rlqwen.config.algorithms import config_class
from rlqwen.config.overrides import fits, parse_override
from rlqwen.plugins.kinds import TRAINERS
from tests.docs.pages import ROOT

PAGES = [ROOT / "docs" / "migration.md", ROOT / "docs" / "zh" / "migration.md"]
LIBRARIES = ["TRL", "ms-swift", "LLaMA-Factory", "OpenRLHF", "verl"]
CONFIGS: list[Any] = [SFTConfig, DPOConfig, GRPOConfig, RewardConfig]
OF_TRAINERS = {
    "quantization_config", "peft_config", "optimizers", "tools", "environment_factory", "rollout_func", "compute_metrics",
    "data_collator", "formatting_func",
}  # fmt: skip
"""Arguments of TRL's trainers, not of their configs."""


def tables(page: Path) -> dict[str, list[list[str]]]:
    """Return library -> the cells of each row of its table."""
    found: dict[str, list[list[str]]] = {}
    for part in page.read_text("utf-8").split("\n## ")[1:]:
        rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| ")]
        found[part.partition("\n")[0]] = [[cell.strip() for cell in row] for row in rows[1:]]
    return found


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def is_known(key: str) -> bool:
    if key.startswith("--"):
        return any(key in parameter.opts for parameter in cli.commands["run"].params)
    if key.startswith("rlqwen "):
        return key.split()[1] in cli.commands
    override = parse_override(f"{key}=x")
    return any(fits(override, config_class(name)) for name in TRAINERS.discover())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_key_of_ours_exists(page: Path, library: str) -> None:
    rows = tables(page)[library]
    assert len(rows) > 20
    for theirs, ours, *_ in rows:
        keys = named(ours)
        assert keys or ours == "—", theirs
        assert [key for key in keys if not is_known(key)] == [], theirs


def test_an_unknown_key_is_found() -> None:
    assert not is_known("train.learning_rte")
    assert not is_known("model.lora.rank")
    assert not is_known("--nproc")
    assert not is_known("rlqwen expert")


def test_every_name_of_trl_exists() -> None:
    fields = {field.name for config in CONFIGS for field in dataclasses.fields(config)} | OF_TRAINERS
    for theirs, *_ in tables(PAGES[0])["TRL"]:
        names = [name.partition(":")[0] for name in named(theirs) if not name.endswith("Trainer")]
        unknown = [
            name for name in names if name not in fields and name not in ("vespo", "dapo", "dr_grpo", "bnpo", "cispo")
        ]
        assert [name for name in unknown if name != "trl.experimental"] == []


def test_the_chinese_page_has_the_same_rows() -> None:
    english, chinese = map(tables, PAGES)
    for library in LIBRARIES:
        assert [named(row[1]) for row in chinese[library]] == [named(row[1]) for row in english[library]], library
        assert [set(named(row[0])) for row in chinese[library]] == [set(named(row[0])) for row in english[library]], (
            library
        )
