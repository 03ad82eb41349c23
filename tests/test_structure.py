"""The code stays easy to find one's way in: short modules and functions, names used once, docstrings that begin with a verb."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rlqwen"
MODULES = sorted(ROOT.rglob("*.py"))
MODULE_LINES, FUNCTION_LINES = 350, 65
LONG_MODULES = {"trainers/base.py": 380}
"""Modules that are longer, and by how much at most: lower the number when one is cut."""
SHARED_NAMES = {
    # One file per algorithm in each of its layers.
    "distillation.py", "dpo.py", "grpo.py", "ppo.py", "reward.py", "sft.py", "online.py",
    # A base and its registry in several packages; vLLM and generation from two sides.
    "base.py", "registry.py", "generation.py", "__init__.py",
}  # fmt: skip
NO_VERB = re.compile(
    r"(?:What|Whether|Where|Which|How|Of|As|In|On|By|For|With|Into|If|While|Whose|Each|Every|All|One|This|These|It|Its|"
    r"The|An?|No|None|Here|Also|Both|Some|Two|Why|When|Not|To|From|Under|Without|ConfigError|ModelError|DataError)\b|[(`]"
)
"""Beginnings of a first line that is not an instruction."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_and_its_functions_are_short(path: Path) -> None:
    limit = LONG_MODULES.get(str(path.relative_to(ROOT)), MODULE_LINES)
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= limit, f"{lines} lines: find the module that is missing in it"
    long = {each.name: each.end_lineno - each.lineno + 1 for each in functions(path) if each.end_lineno}
    assert {name: count for name, count in long.items() if count > FUNCTION_LINES} == {}, "cut them by what they do"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_path_is_resolved_that_may_be_a_loop_of_links(path: Path) -> None:
    assert ".resolve()" not in path.read_text("utf-8"), (
        "it raises RuntimeError for a loop: use config.usable_values.real_path"
    )


def test_the_listed_long_modules_are_long() -> None:
    for name in LONG_MODULES:
        assert len((ROOT / name).read_text("utf-8").splitlines()) > MODULE_LINES, f"{name}: take it off the list"


def test_a_file_name_is_used_once() -> None:
    places = defaultdict(list)
    for path in MODULES:
        if path.name not in SHARED_NAMES:
            places[path.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}, "name one after what is in it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_begins_with_a_verb(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    found = []
    for node in [tree, *functions(path)]:
        text = ast.get_docstring(node)
        if text and NO_VERB.match(text):
            found.append(f"line {getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert found == [], "begin with an imperative verb and its object, such as 'Return the ...'"


def test_modules_import_each_other_in_no_circle() -> None:
    imports = {module_name(path): imported_modules(path) for path in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle of imports: {' -> '.join((*above[above.index(name) :], name))}"
        if name in done:
            return
        for other in imports.get(name, ()):
            if other != name:
                visit(other, (*above, name))
        done.add(name)

    for name in imports:
        visit(name, ())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Return the modules of rlqwen that are imported when this one is; an `__init__` is not counted for its modules."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rlqwen."):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in inner if (ROOT.parent / Path(*name.split("."))).with_suffix(".py").is_file()}
            found |= known or {node.module}
    return found
