"""Figures of generated texts against references: BLEU, chrF, ROUGE, exact match, labels.

Thoughts, `<think>...</think>`, are taken off both sides first; of thoughts that never end nothing is left.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

from rlqwen.config.evaluation import TextMetric
from rlqwen.data.references import references_of
from rlqwen.evaluation.metrics.answer_extraction import after_reasoning, normalise_answer, same_answer
from rlqwen.evaluation.metrics.classification import find_label, label_figures, label_set
from rlqwen.types import Group

_HAN, _KANA, _LETTER = r"[\u3400-\u9fff\uf900-\ufaff]", r"[\u3040-\u30ff]", r"[^\W\d_]"
# Scripts without spaces count by the character, everything else by the word.
_TOKEN = re.compile(rf"{_HAN}|{_KANA}|(?:(?!{_HAN}|{_KANA})[^\W_])+")


@dataclass
class TextFigures:
    """What the metrics gave."""

    values: dict[str, float] = field(default_factory=dict)
    """BLEU and chrF lie in [0, 100], all others in [0, 1]."""
    signatures: dict[str, str] = field(default_factory=dict)
    """How a figure was computed, where it is not comparable between settings: sacrebleu's signatures, ROUGE's tokens."""


class TextMeasure:
    """Text metrics over the completions of rows.

    The references are read at once, so that what is wrong with them shows before anything is sampled: DataError for a
    row without one, or one that is no label where labels are asked for.
    """

    def __init__(
        self,
        metrics: Sequence[TextMetric],
        rows: Sequence[dict[str, Any]],
        *,
        reference: str | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """`rows`: normalised; `prompt.index` of a group is the number of its row."""
        self.metrics = list(dict.fromkeys(metrics))
        self.references = [references_of(row, reference, f"row {number}") for number, row in enumerate(rows)]
        self.labels = label_set(self.references, labels) if "label" in metrics else []

    @property
    def keys(self) -> list[str]:
        """Names of the figures that `figures` gives."""
        return list(text_figures(self.metrics, [""], self.references[:1], self.labels).values)

    def figures(self, groups: Sequence[Group]) -> TextFigures:
        """Figures over every completion of every group."""
        pairs = [
            (completion.text, self.references[group.prompt.index])
            for group in groups
            for completion in group.completions
        ]
        return text_figures(self.metrics, [text for text, _ in pairs], [one for _, one in pairs], self.labels)


def text_figures(
    metrics: Sequence[TextMetric],
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    labels: Sequence[str] = (),
) -> TextFigures:
    """Figures of `texts`, each against its own one or more references; `labels` as `label_set` gives them."""
    figures = TextFigures()
    bare = [after_reasoning(text) for text in texts]
    bare_references = [[after_reasoning(one) for one in several] for several in references]
    for metric in metrics:
        if metric == "exact_match":
            figures.values[metric] = exact_match(texts, references)
        elif metric == "label":
            expected = [normalise_answer(several[0]) for several in references]
            found = label_figures([find_label(text, labels) for text in texts], expected)
            figures.values |= {f"label/{name}": value for name, value in vars(found).items()}
        else:
            _COMPARISONS[metric](bare, bare_references, figures)
    return figures


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts whose answer is that of one of their references; see rlqwen.evaluation.metrics.answer_extraction.same_answer."""
    pairs = zip(texts, references, strict=True)
    return sum(any(same_answer(text, one) for one in several) for text, several in pairs) / len(texts)


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]], figures: TextFigures) -> None:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it (arXiv 1804.08771)."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=bleu_tokenizer(references))
    figures.values["bleu"] = metric.corpus_score(texts, _streams(references)).score
    figures.signatures["bleu"] = str(metric.get_signature())


def _chrf(texts: Sequence[str], references: Sequence[Sequence[str]], figures: TextFigures) -> None:
    """Corpus chrF2 (Popović 2015) as sacrebleu computes it."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    figures.values["chrf"] = metric.corpus_score(texts, _streams(references)).score
    figures.signatures["chrf"] = str(metric.get_signature())


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]], figures: TextFigures) -> None:
    """Mean F of ROUGE-1, -2 and -L (Lin 2004), of several references the best; without stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=RougeTokenizer())
    console = Console(stderr=True)
    pairs = zip(texts, references, strict=True)
    shown = track(pairs, "rouge", len(texts), console=console, disable=not console.is_terminal, transient=True)
    scores = [scorer.score_multi(several, text) for text, several in shown]
    for name, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        figures.values[name] = float(sum(score[theirs].fmeasure for score in scores) / len(scores))
    figures.signatures["rouge"] = "tokens:words+cjk-characters|stemmer:no|mean:f1"


class RougeTokenizer:
    """Lower-case words; Chinese characters and Japanese kana one by one. rouge-score's own keeps only a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, punctuation left out."""
        return _TOKEN.findall(text.lower())


def bleu_tokenizer(references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's tokenizer for the references' script: `zh` where most letters are Chinese, `char` where they are
    Japanese (kana among them), else its default `13a`."""
    text = " ".join(one for several in references for one in several)
    han, kana, letters = (len(re.findall(pattern, text)) for pattern in (_HAN, _KANA, _LETTER))
    if 2 * (han + kana) <= letters:
        return "13a"
    return "char" if 10 * kana > han else "zh"


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """sacrebleu's form: the first reference of every text, then the second of each, None where there is none."""
    most = max(map(len, references))
    return [[several[i] if i < len(several) else None for several in references] for i in range(most)]


_COMPARISONS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]], TextFigures], None]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
}
