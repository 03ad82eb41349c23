"""A Chinese page has the code of the English one, so that a change of either without the other fails."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks, name_of

TRANSLATED = [ROOT / "README.zh.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]


def english(page: Path) -> Path:
    return ROOT / "README.md" if page.parent == ROOT else ROOT / "docs" / page.name


def code(page: Path) -> list[tuple[str, list[str]]]:
    """Return the language and the lines of each block, without comments."""
    return [
        (block.language, [re.sub(r"\s+# .*|^# .*", "", line) for line in block.text.splitlines()])
        for block in blocks(page)
    ]


@pytest.mark.parametrize("page", TRANSLATED, ids=name_of)
def test_a_translation_has_the_code_of_its_original(page: Path) -> None:
    assert code(page) == code(english(page))


@pytest.mark.parametrize("page", TRANSLATED, ids=name_of)
def test_a_translation_has_the_headings_and_table_rows_of_its_original(page: Path) -> None:
    def counts(text: str) -> tuple[list[int], int]:
        levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
        return levels, len(re.findall(r"^\|", text, re.MULTILINE))

    def without_code(page: Path) -> str:
        return re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)

    assert counts(without_code(page)) == counts(without_code(english(page)))
