"""The pictures of the design pages are well-formed, described, and readable in light and dark."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.docs.pages import ROOT

PAGES = sorted((ROOT / "docs" / "design").glob("*.md"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_picture_of_a_design_page_follows_the_color_scheme(page: Path) -> None:
    (name,) = re.findall(r"\(\.\./images/([\w-]+\.svg)\)", page.read_text("utf-8"))
    picture = ElementTree.parse(ROOT / "docs" / "images" / name).getroot()
    title, description, style = (picture.findtext(f"{SVG}{tag}", "") for tag in ("title", "desc", "style"))
    assert title
    assert description
    light, _, dark = style.partition("prefers-color-scheme: dark")
    fills = [set(re.findall(r"(\.\w+|text) \{[^}]*fill: #", part)) for part in (light, dark)]
    assert fills[0] == fills[1]
    used = {f".{name}" for part in picture.iter() for name in (part.get("class") or "").split()}
    assert used - {".title", ".line", ".back"} <= fills[0]
