"""Text from strangers never controls the terminal, and output that cannot be written stops no training."""

import ast
import errno
import io
import json
import os
import pickle
import pty
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlqwen.cli import main
from rlqwen.errors import DataError, Interrupted, RolloutError, SaveError
from rlqwen.reporting import MetricLogger
from rlqwen.reporting.console import TerminalConsole
from rlqwen.terminal import (
    TerminalStream,
    get_logger,
    guarded_streams,
    json_text,
    outlive_output,
    printable,
    printable_lines,
    warn,
)
from tests.forked import run_forked
from tests.patience import PATIENCE_S

ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H\x1bc",
    "clipboard": "\x1b]52;c;ZWNobyBo\x1b\\",
    "link": "\x1b]8;;https://evil.example\x1b\\safe.example\x1b]8;;\x1b\\",
    "C1": "\x9b2J\x9d0;owned\x9c\x90q\x9c\x85",
    "bidi": "\u202egnp.exe\u202c \u2066x\u2069 \u202ax\u202c",
    "other": "\x00\x07\x08\x0b\x0c\x0e\x7f\u2028\u2029",
    "overwritten": "bad\rgood",
}
ATTACK = "".join(ATTACKS.values())
ORDINARY = "中文，繁體\n第二行\t😀 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 é ё Ω שלום \u200f مرحبا ⟦x⟧ \\x1b [red]x[/red] :smile:\r\n"
OWN_STYLES = re.compile(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r")
"""What rich writes by itself: colors, and the movements of a live display."""
ROOT = Path(__file__).parent.parent / "rlqwen"


def unsafe(text: str) -> list[str]:
    """Return the characters of `text` that a terminal may obey, by another rule than the product's."""
    kinds = {"Cc", "Cs", "Zl", "Zp"}
    turned = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return [
        repr(character)
        for character in text.replace("\r\n", "")
        if character not in "\n\t"
        and (unicodedata.category(character) in kinds or unicodedata.bidirectional(character) in turned)
    ]


def in_terminal(action: Callable[[], object]) -> str:
    """Call `action` in a child whose standard output and error are a terminal; return what reached it."""
    terminal, end = pty.openpty()
    read: list[bytes] = []

    def listen() -> None:
        try:
            while part := os.read(terminal, 65536):
                read.append(part)
        except OSError:  # the last writer has closed its end
            pass

    def act() -> None:
        for descriptor in (1, 2):
            os.dup2(end, descriptor)
        sys.stdout, sys.stderr = (open(descriptor, "w", encoding="utf-8", closefd=False) for descriptor in (1, 2))  # noqa: SIM115
        os.environ.pop("RLQWEN_DISPLAY", None)
        action()
        sys.stdout.flush()

    listener = threading.Thread(target=listen)
    listener.start()
    run_forked(act)
    os.close(end)
    listener.join(PATIENCE_S)
    os.close(terminal)
    text = b"".join(read).decode("utf-8")
    assert text, "nothing was shown"
    return text.replace("\r\n", "\n")


def test_of_all_characters_only_those_that_control_a_terminal_are_escaped() -> None:
    characters = [*map(chr, range(0x10000)), *map(chr, range(0xE0000, 0xE0080))]
    for character in characters:
        shown = printable(character)
        assert (shown == character) == (not unsafe(character)), repr(character)
    assert unsafe(printable("".join(characters))) == []


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_shown_as_what_it_is(name: str) -> None:
    assert unsafe(printable(ATTACKS[name])) == []
    assert ATTACKS[name].encode("unicode_escape").decode().replace("\\\\", "\\") == printable(ATTACKS[name])


def test_ordinary_text_stays_as_it_is() -> None:
    assert printable(ORDINARY) == ORDINARY
    screen = io.StringIO()
    TerminalStream(screen, keeps_going=False).write(ORDINARY)
    assert screen.getvalue() == ORDINARY


def test_json_is_printable_and_reads_back() -> None:
    value = {ATTACK: [ORDINARY, "".join(map(chr, range(0x3000)))], "half": "\ud800"}
    text = json_text(value)
    assert unsafe(text) == []
    assert json.loads(text) == value


def test_rich_prints_neither_escapes_nor_links_nor_markup() -> None:
    screen = io.StringIO()
    console = TerminalConsole(screen, force_terminal=True, width=60)
    table = Table("name", f"[red]head{ATTACK}", title=f"[link=x]{ATTACK}")
    table.add_row(f"[bold]cell[/bold]{ATTACK}", Text(ATTACK, style="green"))
    console.print(table)
    console.print(Panel(Text(ATTACK), title=Text(ATTACK)))
    console.print(Text.from_ansi(ATTACKS["link"]), f"[link=https://evil.example]x[/link] :smile: {ATTACK}")
    console.rule(ATTACK)
    text = screen.getvalue()
    assert unsafe(OWN_STYLES.sub("", text)) == []
    assert "[bold]cell[/bold]" in text
    assert "[link=https://evil.example]x[/link] :smile:" in text
    assert "\x1b[32m" in text, "rich's own styles are kept"


def test_rich_breaks_lines_at_the_width_of_what_is_shown() -> None:
    screen = io.StringIO()
    table = Table(box=None, padding=0)
    table.add_column(overflow="fold")
    table.add_row(Text("\x1b" * 40))
    TerminalConsole(screen, width=20).print(table)
    assert "".join(screen.getvalue().split()) == "\\x1b" * 40


@pytest.mark.parametrize("kind", [DataError, SaveError, Interrupted, RolloutError])
def test_errors_are_printable_also_from_another_process(kind: type[Exception]) -> None:
    error = pickle.loads(pickle.dumps(kind(f"x{ATTACK}")))
    assert str(error).startswith(printable(f"x{ATTACKS['title']}{ATTACKS['clear']}"))
    assert unsafe(str(error)) == []


def test_warnings_and_log_lines_are_printable(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="owned") as caught:
        warn(ATTACK)
    get_logger("rlqwen.tests").warning("%s", ATTACK)
    assert str(caught[0].message) == caplog.messages[0] == printable(ATTACK)
    assert caught[0].filename == __file__


def test_a_data_row_cannot_control_the_terminal(tmp_path: Path) -> None:
    rows = tmp_path / f"{ATTACKS['title']}.jsonl"
    turn = {"role": "user", "content": f"{ORDINARY}{ATTACK}"}
    rows.write_text(json.dumps({"messages": [turn, turn | {"role": "assistant"}], ATTACK: 1}) + "\n" + "{\x1b[2J\n")
    assert main(["data", "check", str(rows), "--json"]) == 2  # imports for the children too
    for command in ("show", "check"):
        text = in_terminal(partial(main, ["data", command, str(rows)]))
        assert unsafe(OWN_STYLES.sub("", text)) == []
        assert "x1b" in text


def test_a_path_cannot_control_the_terminal() -> None:
    for arguments in (["run", f"{ATTACK}.yaml"], ["run", "quickstart_sft", f"train.{ATTACK}=1"], [ATTACK]):
        text = in_terminal(partial(main, arguments))
        assert unsafe(OWN_STYLES.sub("", text)) == []
        assert "x1b]0;owned" in text


def test_a_run_cannot_control_the_terminal(tmp_path: Path) -> None:
    """Show metrics, notes and a user's print on a live display, in a run folder with a hostile name."""

    def train() -> None:
        with (
            guarded_streams(),
            MetricLogger(tmp_path / f"run{ATTACKS['link']}", total_steps=2, algorithm="grpo") as log,
        ):
            log.log(1, {"reward/mean": 1.0, f"reward/{ATTACK}/mean": 1.0})
            log.log(1, {"eval/reward/mean": 1.0, f"eval/reward/{ATTACK}/mean": 1.0})
            log.note(f"train: column {ATTACK}")
            print("a reward prints", ATTACK)

    text = in_terminal(train)
    assert "\x1b[?25l" in text, "the live display"
    assert unsafe(OWN_STYLES.sub("", text)) == []


def test_a_traceback_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError(ATTACK, Hostile())

    class Hostile:
        def __repr__(self) -> str:
            return ATTACK

    monkeypatch.setattr("rlqwen.config.recipe_yaml.list_recipes", fail)
    text = in_terminal(lambda: main(["recipes"]))
    assert "KeyError" in text
    assert unsafe(OWN_STYLES.sub("", text)) == []


def test_progress_bars_of_other_libraries_may_draw_their_line_anew() -> None:
    screen = io.StringIO()
    stream = TerminalStream(screen, keeps_going=False)
    for written in ("\r  0%|", "\n", "\x1b[A", f"\r{ATTACKS['title']}"):
        stream.write(written)
    assert screen.getvalue() == f"\r  0%|\n\x1b[A\r{printable(ATTACKS['title'])}"


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_lost_output_ends_a_command_and_not_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    with guarded_streams():
        with pytest.raises(OSError, match="No space"):
            print("x")
        outlive_output()
        print("x")
    with guarded_streams():
        outlive_output()
        print("x")
        print("x")
    said = "rlqwen: standard output cannot be written (No space left on device): going on without it\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">/dev/full", 1, "rlqwen: standard output cannot be written: [Errno 28] No space left on device\n"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_a_command_whose_output_is_lost_says_so(redirection: str, code: int, said: str) -> None:
    command = f"{sys.executable} -m rlqwen recipes {redirection}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, ended.stderr) == (code, said)


def calls(tree: ast.AST) -> set[str]:
    """Return the functions that a module calls, as written."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_shown_through_one_module(path: Path) -> None:
    """Hold that no module shows text around rlqwen.terminal; click's echo writes to the command line's guarded streams."""
    found = calls(ast.parse(path.read_text("utf-8")))
    if path.name not in ("terminal.py", "__main__.py"):  # which runs before anything is imported
        assert found.isdisjoint({"print", "warnings.warn", "sys.stdout.write", "sys.stderr.write"}), "use terminal.py"
        assert "Console" not in found, "use TerminalConsole"
        assert "logging.getLogger(__name__)" not in path.read_text("utf-8"), "use get_logger"
    if path.parent.name != "cli":
        assert "click.echo" not in found, "only the command line's streams are guarded"


def test_a_message_has_the_lines_that_a_terminal_shows() -> None:
    """A character that `str.splitlines` takes for the end of a line is shown as an escape, and ends none."""
    ends = [chr(code) for code in range(0x3000) if len(f"a{chr(code)}b".splitlines()) == 2]
    assert {"\n", "\r", "\x85", "\u2028"} <= set(ends)
    for end in ends:
        message = str(DataError(f"row 3{end}of it"))
        assert message == printable(f"row 3{end}of it")
        assert len(message.split("\n")) == (2 if end == "\n" else 1), end
        assert len(str(DataError(f"row{end}" * 50)).split("\n")) == (31 if end == "\n" else 1), end
    assert printable_lines("one\r\ntwo\x85\nthree\u2028") == ["one", "two\\x85", "three\\u2028"]
