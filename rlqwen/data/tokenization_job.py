"""One way of tokenizing rows, cut so that parts of the data can be done apart, in other processes, and put together."""

from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from rlqwen.config.trainer import TrainerConfig
from rlqwen.data.arrow_file import ArrowRows, Codec
from rlqwen.data.data_report import NAMED, DataReport, format_examples
from rlqwen.data.template_source import load_chat_template
from rlqwen.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Item = TypeVar("Item")


def data_settings(config: TrainerConfig, kind: type[TrainerConfig], apart_from: Collection[str] = ()) -> dict[str, Any]:
    """Return the config keys that a trainer's token ids may depend on: those of `kind` that not every trainer has.

    A chat template stands for its text, whatever file it is read from.
    """
    names = set(kind.model_fields) - set(TrainerConfig.model_fields) - set(apart_from)
    values = config.model_dump(mode="json", include=names)
    path = values.get("chat_template_path")
    return values | ({"chat_template": load_chat_template(path)} if path else {})


@dataclass(slots=True)
class TokenizationStats:
    """Counts over a part of the rows, for the report."""

    report: DataReport = field(default_factory=DataReport)
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    """Tokens of each row before any cut."""
    counts: Counter[str] = field(default_factory=Counter)
    """What else the job counts."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """What a message will say of the first few rows of a kind, which `counts` counts."""
    end_tokens: list[str | None] = field(default_factory=list)
    """The tokens that end what the model writes, each once."""

    def add(self, other: "TokenizationStats") -> None:
        """Add the counts of the rows that come next."""
        self.report.merge(other.report)
        self.lengths += other.lengths
        self.counts.update(other.counts)
        for kind, texts in other.examples.items():
            mine = self.examples.setdefault(kind, [])
            mine += texts[: max(NAMED - len(mine), 0)]
        self.end_tokens += [end for end in other.end_tokens if end not in self.end_tokens]

    def add_example(self, kind: str, text: str) -> None:
        """Count a row of a kind, and keep `text` if the row is one of the first of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= NAMED:
            self.examples.setdefault(kind, []).append(text)

    def format_examples(self, kind: str) -> str:
        """Return the first few rows of a kind, and how many more there are."""
        return format_examples(self.examples[kind], self.counts[kind])

    def end_of_turn(self, eos: str | None) -> str | None:
        """Return the token that ends turns if rows had any, else `eos`."""
        return next((end for end in self.end_tokens if end != eos), eos)


class TokenizingJob(ABC, Generic[Item]):
    """Turns rows into items. It pickles, and works the same in any process."""

    codec: ClassVar[Codec[Any]]

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Leave out attributes that are computed from the others at first use."""
        return {name: value for name, value in vars(self).items() if name not in ("renderer", "chat", "unused")}

    @abstractmethod
    def run(
        self, start: int, rows: Sequence[Row], faults: list[DataError] | None
    ) -> tuple[list[Item], TokenizationStats]:
        """Make items of the rows, the first of which has the number `start`; add a bad row to `faults`, or raise."""

    @abstractmethod
    def finish(self, stats: TokenizationStats, faults: list[DataError] | None) -> DataReport:
        """Return the report on all rows; raise or note a DataError if no items remain."""

    @abstractmethod
    def describe(self, report: DataReport, rows: Sequence[Row]) -> None:
        """Add the form of the rows to the report; only some rows are looked at."""

    @abstractmethod
    def settings(self) -> Any:
        """Return what the items depend on besides rows and tokenizer, as JSON values."""

    def present(self, stored: ArrowRows[Any], rows: Sequence[Row]) -> Sequence[Item]:
        """Return the items of a file that `codec` wrote; `rows`: the rows that they were made of."""
        return stored
