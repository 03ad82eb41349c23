"""Compare generated texts with references: BLEU, chrF, ROUGE, exact match, labels.

Thoughts, `<think>...</think>`, are removed from both sides first; a text whose thoughts never end becomes empty.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.progress import track

from rlqwen.config.evaluation import TextMetric
from rlqwen.data.references import references_of
from rlqwen.evaluation.metrics.answer_extraction import after_reasoning, normalize_answer, same_answer
from rlqwen.evaluation.metrics.classification import find_label, label_metrics, label_set
from rlqwen.reporting.console import TerminalConsole
from rlqwen.types import Group

_HAN, _KANA, _LETTER = r"[\u3400-\u9fff\uf900-\ufaff]", r"[\u3040-\u30ff]", r"[^\W\d_]"
# Tokens are characters in scripts without spaces, and words in all others.
_TOKEN = re.compile(rf"{_HAN}|{_KANA}|(?:(?!{_HAN}|{_KANA})[^\W_])+")


@dataclass
class TextMetrics:
    """Values of text metrics."""

    values: dict[str, float] = field(default_factory=dict)
    """BLEU and chrF lie in [0, 100], all others in [0, 1]."""
    signatures: dict[str, str] = field(default_factory=dict)
    """How a metric was computed, if other settings give other values: sacrebleu's signatures, ROUGE's tokens."""


class TextMeasure:
    """Compute text metrics over the completions of rows.

    The references are read at once, so that faults show before anything is sampled: DataError for a row without a
    reference, or for one that is not a label if labels are asked for.
    """

    def __init__(
        self,
        metrics: Sequence[TextMetric],
        rows: Sequence[dict[str, Any]],
        *,
        reference: str | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Take normalized `rows`; `prompt.index` of a group is the number of its row."""
        self.metrics = list(dict.fromkeys(metrics))
        self.references = [references_of(row, reference, f"row {number}") for number, row in enumerate(rows)]
        self.labels = label_set(self.references, labels) if "label" in metrics else []

    @property
    def keys(self) -> list[str]:
        """Return the names of the values that `compute` gives."""
        return list(text_metrics(self.metrics, [""], self.references[:1], self.labels).values)

    def compute(self, groups: Sequence[Group]) -> TextMetrics:
        """Compute the metrics over every completion of every group."""
        pairs = [
            (completion.text, self.references[group.prompt.index])
            for group in groups
            for completion in group.completions
        ]
        return text_metrics(self.metrics, [text for text, _ in pairs], [one for _, one in pairs], self.labels)


def text_metrics(
    names: Sequence[TextMetric],
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    labels: Sequence[str] = (),
) -> TextMetrics:
    """Compute the metrics `names` of texts, each against its own references; `labels` as `label_set` returns them."""
    result = TextMetrics()
    bare = [after_reasoning(text) for text in texts]
    bare_references = [[after_reasoning(one) for one in several] for several in references]
    for metric in names:
        if metric == "exact_match":
            result.values[metric] = exact_match(texts, references)
        elif metric == "label":
            expected = [normalize_answer(several[0]) for several in references]
            found = label_metrics([find_label(text, labels) for text in texts], expected)
            result.values |= {f"label/{name}": value for name, value in vars(found).items()}
        else:
            _COMPARISONS[metric](bare, bare_references, result)
    return result


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the share of texts whose answer is that of one of their references; see answer_extraction.same_answer."""
    pairs = zip(texts, references, strict=True)
    return sum(any(same_answer(text, one) for one in several) for text, several in pairs) / len(texts)


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]], result: TextMetrics) -> None:
    """Compute corpus BLEU (Papineni et al. 2002) by sacrebleu (arXiv 1804.08771)."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=bleu_tokenizer(references))
    result.values["bleu"] = metric.corpus_score(texts, _streams(references)).score
    result.signatures["bleu"] = str(metric.get_signature())


def _chrf(texts: Sequence[str], references: Sequence[Sequence[str]], result: TextMetrics) -> None:
    """Compute corpus chrF2 (Popović 2015) by sacrebleu."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    result.values["chrf"] = metric.corpus_score(texts, _streams(references)).score
    result.signatures["chrf"] = str(metric.get_signature())


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]], result: TextMetrics) -> None:
    """Compute the mean F of ROUGE-1, -2 and -L (Lin 2004), for the best of several references; without stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=RougeTokenizer())
    console = TerminalConsole(stderr=True)
    pairs = zip(texts, references, strict=True)
    shown = track(pairs, "rouge", len(texts), console=console, disable=not console.is_terminal, transient=True)
    scores = [scorer.score_multi(several, text) for text, several in shown]
    for name, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        result.values[name] = float(sum(score[theirs].fmeasure for score in scores) / len(scores))
    result.signatures["rouge"] = "tokens:words+cjk-characters|stemmer:no|mean:f1"


class RougeTokenizer:
    """Split text into lower-case words, and Chinese and kana into characters; rouge-score itself keeps only a-z, 0-9."""

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text, without punctuation."""
        return _TOKEN.findall(text.lower())


def bleu_tokenizer(references: Sequence[Sequence[str]]) -> str:
    """Return sacrebleu's tokenizer for the references' script.

    It is `zh` if most letters are Chinese, `char` if they are Japanese (with kana among them), else its default `13a`.
    """
    text = " ".join(one for several in references for one in several)
    han, kana, letters = (len(re.findall(pattern, text)) for pattern in (_HAN, _KANA, _LETTER))
    if 2 * (han + kana) <= letters:
        return "13a"
    return "char" if 10 * kana > han else "zh"


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Return references in sacrebleu's form: the first of every text, then the second of each, None if there is none."""
    most = max(map(len, references))
    return [[several[i] if i < len(several) else None for several in references] for i in range(most)]


_COMPARISONS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]], TextMetrics], None]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
}
