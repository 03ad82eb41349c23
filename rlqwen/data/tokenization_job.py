"""Define a tokenization job, whose parts may run in several processes, and the statistics that its parts merge."""

from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from rlqwen.config.trainer import TrainerConfig
from rlqwen.data.arrow_file import ArrowRows, Codec
from rlqwen.data.data_report import MAX_EXAMPLES, DataReport, format_examples
from rlqwen.data.template_source import load_chat_template
from rlqwen.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Item = TypeVar("Item")


def data_settings(config: TrainerConfig, kind: type[TrainerConfig], excluded: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings that token ids may depend on: keys of `kind` that not every trainer has, except `excluded`.

    The chat template is included as text, so that the name of its file does not matter.
    """
    names = set(kind.model_fields) - set(TrainerConfig.model_fields) - set(excluded)
    values = config.model_dump(mode="json", include=names)
    path = values.get("chat_template_path")
    return values | ({"chat_template": load_chat_template(path)} if path else {})


@dataclass(slots=True)
class TokenizationStats:
    """Collect counts over some of the rows, for the report."""

    report: DataReport = field(default_factory=DataReport)
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    """Tokens of each row before truncation."""
    counts: Counter[str] = field(default_factory=Counter)
    """Other counts of the job."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Text about the first few rows of each kind in `counts`, for messages."""
    end_tokens: list[str | None] = field(default_factory=list)
    """Distinct tokens that end an answer."""

    def add(self, other: "TokenizationStats") -> None:
        """Add the counts of the rows that come next."""
        self.report.merge(other.report)
        self.lengths += other.lengths
        self.counts.update(other.counts)
        for kind, texts in other.examples.items():
            mine = self.examples.setdefault(kind, [])
            mine += texts[: max(MAX_EXAMPLES - len(mine), 0)]
        self.end_tokens += [end for end in other.end_tokens if end not in self.end_tokens]

    def add_example(self, kind: str, text: str) -> None:
        """Count a row of a kind, and keep `text` if it is one of the first of this kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_EXAMPLES:
            self.examples.setdefault(kind, []).append(text)

    def format_examples(self, kind: str) -> str:
        """Join the texts of the first few rows of a kind, and say how many more there are."""
        return format_examples(self.examples[kind], self.counts[kind])

    def end_of_turn(self, eos: str | None) -> str | None:
        """Return the template's end-of-turn token if any row used it, else `eos`."""
        return next((end for end in self.end_tokens if end != eos), eos)


class TokenizingJob(ABC, Generic[Item]):
    """Turn rows into items. A job can be pickled, and gives the same items in any process."""

    codec: ClassVar[Codec[Any]]

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Leave out cached properties, which are computed again at first use."""
        return {name: value for name, value in vars(self).items() if name not in ("renderer", "chat", "unused")}

    @abstractmethod
    def run(
        self, start: int, rows: Sequence[Row], faults: list[DataError] | None
    ) -> tuple[list[Item], TokenizationStats]:
        """Turn rows, the first of which has the number `start`, into items; append errors to `faults`, or raise them."""

    @abstractmethod
    def finish(self, stats: TokenizationStats, faults: list[DataError] | None) -> DataReport:
        """Return the report on all rows; raise a DataError, or append it to `faults`, if no items remain."""

    @abstractmethod
    def describe(self, report: DataReport, rows: Sequence[Row]) -> None:
        """Add the format of the rows to the report, from a sample of them."""

    @abstractmethod
    def settings(self) -> Any:
        """Return the settings that items depend on besides rows and tokenizer, as JSON values."""

    def present(self, stored: ArrowRows[Any], rows: Sequence[Row]) -> Sequence[Item]:
        """Return the items of a file that `codec` wrote; `rows` are their source rows."""
        return stored
