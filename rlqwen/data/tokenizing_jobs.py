"""One way of tokenising rows, cut so that parts of the data can be done apart, in other processes, and put together."""

from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from rlqwen.config.trainer import TrainerConfig
from rlqwen.data.arrow_file import ArrowRows, Codec
from rlqwen.data.data_report import NAMED, DataReport, first_of
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
class Tally:
    """Counts over a part of the rows, for the report."""

    report: DataReport = field(default_factory=DataReport)
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    """Tokens of each row before any cut."""
    counts: Counter[str] = field(default_factory=Counter)
    """What else the job counts."""
    named: dict[str, list[str]] = field(default_factory=dict)
    """What a message will say of the first few rows of a kind, which `counts` counts."""
    ends: list[str | None] = field(default_factory=list)
    """The tokens that end what the model writes, each once."""

    def add(self, other: "Tally") -> None:
        """Add the counts of the rows that come next."""
        self.report.merge(other.report)
        self.lengths += other.lengths
        self.counts.update(other.counts)
        for kind, texts in other.named.items():
            mine = self.named.setdefault(kind, [])
            mine += texts[: max(NAMED - len(mine), 0)]
        self.ends += [end for end in other.ends if end not in self.ends]

    def name(self, kind: str, text: str) -> None:
        """Count a row of a kind, and keep `text` if the row is one of the first of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= NAMED:
            self.named.setdefault(kind, []).append(text)

    def first_of(self, kind: str) -> str:
        """Return the first few rows of a kind, and how many more there are."""
        return first_of(self.named[kind], self.counts[kind])

    def end_of_turn(self, eos: str | None) -> str | None:
        """Return the token that ends turns if rows had any, else `eos`."""
        return next((end for end in self.ends if end != eos), eos)


class TokenizingJob(ABC, Generic[Item]):
    """Turns rows into items. It pickles, and works the same in any process."""

    codec: ClassVar[Codec[Any]]

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Leave out attributes that are computed from the others at first use."""
        return {name: value for name, value in vars(self).items() if name not in ("writer", "chat", "unused")}

    @abstractmethod
    def run(self, start: int, rows: Sequence[Row], faults: list[DataError] | None) -> tuple[list[Item], Tally]:
        """Make items of the rows, the first of which has the number `start`; add a bad row to `faults`, or raise."""

    @abstractmethod
    def finish(self, tally: Tally, faults: list[DataError] | None) -> DataReport:
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
