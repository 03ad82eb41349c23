"""Every link inside the repository's pages leads to a file, and to an anchor in it, that is there."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generate_reference import slug as slug_of_reference
from tests.docs.pages import REPOSITORY, ROOT, anchors, links, name_of, pages, slug

DOCS = ROOT / "docs"
OTHER_HOSTS = re.compile(r"(?:https?|mailto):")


def fault(page: Path, link: str) -> str | None:
    """Say what is wrong with a link; None if it is right, or leads to another host."""
    target, _, anchor = link.partition("#")
    if link.startswith(REPOSITORY):
        found = re.fullmatch(r"(?:blob|tree)/main/(.+)", target.removeprefix(REPOSITORY))
        badge = re.fullmatch(r"actions/workflows/([\w.-]+)(?:/badge\.svg)?", target.removeprefix(REPOSITORY))
        if badge is not None:
            return None if (ROOT / ".github" / "workflows" / badge[1]).is_file() else "no such workflow"
        if found is None:
            return None
        file = ROOT / found[1]
    elif OTHER_HOSTS.match(link):
        return None
    else:
        file = (page.parent / target).resolve() if target else page
        if DOCS in page.parents and DOCS not in file.parents:
            return f"leaves docs/, which the site cannot follow: link to {REPOSITORY}blob/main/..."
    if not file.exists():
        return "no such file"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"no such heading; there are {', '.join(sorted(anchors(file)))}"
    return None


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_link_inside_the_repository_resolves(page: Path) -> None:
    faults = {link: said for link in links(page) if (said := fault(page, link)) is not None}
    assert faults == {}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = ROOT / "README.md"
    assert fault(page, "LICENSE") is None
    assert fault(page, "no-such-file.md") == "no such file"
    assert "no such heading" in str(fault(page, "SECURITY.md#no-such-heading"))
    assert fault(page, f"{REPOSITORY}blob/main/rlqwen/nothing.py") == "no such file"
    assert fault(page, f"{REPOSITORY}actions/workflows/nothing.yml/badge.svg") == "no such workflow"
    assert "leaves docs/" in str(fault(DOCS / "index.md", "../README.md"))


def test_the_reference_names_its_anchors_as_the_site_does() -> None:
    for heading in ("model.lora", "data.train, data.eval", "train, algorithm sft"):
        assert slug_of_reference(heading) == slug(heading)


@pytest.mark.parametrize("page", sorted(ROOT.glob("README*.md")), ids=name_of)
def test_the_badges_are_true(page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    shown = dict(re.findall(r"img\.shields\.io/badge/(\w+)-(.+?)-\w+\)", page.read_text("utf-8")))
    license_shown, python_shown = shown["license"].replace("--", "-"), shown["python"].replace("%2B", "+")
    assert license_shown == project["license"]
    assert f">={python_shown.removesuffix('+')}" == project["requires-python"]


class _Loader(yaml.SafeLoader):
    """Read mkdocs.yml, whose tags name Python functions that only mkdocs needs."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def test_the_navigation_holds_every_page_once() -> None:
    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]

    named = files(yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), _Loader)["nav"])
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.glob("**/*.md"))
