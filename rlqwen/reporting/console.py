"""Print with rich what cannot control the terminal, except for rich's own styles."""

import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Span, Text

from rlqwen.terminal import UNSAFE, printable, styled


class TerminalConsole(Console):
    """Print text as it is: no markup, no emoji codes, no links, and escape codes made visible.

    Args:
        file: a text stream; by default standard output, or standard error if `stderr` is true.
        options: further arguments of rich's Console.
    """

    def __init__(self, file: IO[str] | None = None, *, stderr: bool = False, **options: Any) -> None:
        stream = file or styled(sys.stderr if stderr else sys.stdout)
        super().__init__(file=stream, stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string of a table or a title as printable text."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of anything that rich can print."""
        if isinstance(renderable, Text):
            renderable = _printable_text(renderable)  # before lines are broken and cropped
        for segment in super().render(renderable, options):
            yield segment if segment.control else _printable_segment(segment)


def _printable_text(text: Text) -> Text:
    cuts = {cut for match in UNSAFE.finditer(text.plain) for cut in match.span()}
    if not cuts:
        return text
    made = text.blank_copy()
    for piece in text.divide(sorted(cuts)):
        if UNSAFE.match(piece.plain):
            shown = printable(piece.plain)
            piece = Text(shown, spans=[Span(0, len(shown), span.style) for span in piece.spans])
        made.append_text(piece)
    return made


def _printable_segment(segment: Segment) -> Segment:
    text = printable(segment.text)
    style = segment.style
    if style is not None and style.link:
        style = style.update_link(None)
    return segment if text == segment.text and style is segment.style else Segment(text, style)
