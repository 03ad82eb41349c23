"""Read the repository's Markdown pages: their fenced blocks, commands, links and anchors.

A comment in the line before a block says what the tests do with it:

    <!-- runs -->                 run this Python block, after the others of its page that run, in one namespace
    <!-- not checked: reason -->  check nothing of this block, which is in a form that rlqwen does not read

A block whose first line is a comment that names a file, such as `# my_reward.py`, is that file for the rest of its page.
"""

import re
import shlex
import textwrap
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.generate_reference import MARKER, reference

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/rlqwen/rlqwen/"
_FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)(?P<fence>`{3,})(?P<language>[\w+-]*)[^\n]*\n"
    r"(?P<text>.*?)^(?P=indent)(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_SHELLS = {"bash", "sh", "shell", "console"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Line of the page in which its text begins, from 1."""
    language: str
    text: str
    mark: str
    """The comment in the line before it; empty if there is none."""

    @property
    def is_checked(self) -> bool:
        return not self.mark.startswith("not checked")

    @property
    def runs(self) -> bool:
        return self.language == "python" and self.mark == "runs"

    @property
    def file(self) -> str | None:
        """Return the name of the file that the block is, if its first line says so."""
        found = re.match(r"# ([\w./-]+\.(?:py|yaml|toml|jsonl?))\b", self.text)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Return every Markdown page that readers see."""
    found = [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "benchmarks", "examples") for page in ROOT.glob(f"{folder}/**/*.md")),
    ]
    return sorted(found)


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, without the indent that lists and admonitions give them."""
    text = page.read_text("utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")) + 1,
            found["language"],
            textwrap.dedent(found["text"]),
            found["mark"] or "",
        )
        for found in _FENCE.finditer(text)
    ]


def write_files(page: Path, folder: Path) -> None:
    """Write the files that a page's blocks are into `folder`."""
    for block in blocks(page):
        if block.file is not None:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, "utf-8")


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the words of each command in the shell blocks of a page, without comments and prompts."""
    for block in blocks(page):
        if block.language in _SHELLS and block.is_checked:
            text = block.text.replace("\\\n", " ")
            for line in text.splitlines():
                for part in re.split(r"\s(?:&&|\|\|?|;)\s", line.removeprefix("$ ")):
                    words = shlex.split(part, comments=True)
                    while words and re.match(r"\w+=", words[0]):
                        del words[0]  # a variable of the environment
                    if words:
                        yield f"{block}: {part.strip()}", words


def prose(page: Path) -> str:
    """Return the text of a page without fenced blocks and inline code, with generated parts in their place."""
    text = page.read_text("utf-8").replace(MARKER, reference())
    return re.sub(r"(`+)[^`\n]+\1", "", _FENCE.sub("", text))


def links(page: Path) -> Iterator[str]:
    """Yield the targets of a page's links and images."""
    text = prose(page)
    yield from re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text)
    yield from re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    yield from re.findall(r"<(?:a|img|source)\b[^>]*?(?:href|src|srcset)=\"([^\"]+)\"", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site's `toc` name them, and those set in HTML."""
    text = _FENCE.sub("", page.read_text("utf-8").replace(MARKER, reference()))
    headings = re.findall(r"^#{1,6} +(.+?)(?: +\{[^}]*\})? *$", text, re.MULTILINE)
    return {slug(heading) for heading in headings} | set(re.findall(r"(?:\bid=\"|\{#)([\w-]+)", text))


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", text)).strip().lower().replace(" ", "-")
