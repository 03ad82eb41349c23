"""Find equal and nearly equal texts.

Two texts are near duplicates if the Jaccard similarity of their sets of three consecutive words, in lower case and
without punctuation, is at least the threshold. A Chinese, Japanese or Korean character counts as a word. MinHash-LSH
(Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3) finds candidates, which are compared exactly.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

_NUM_PERM = 128
_SEED = 1
_MISSED = 1e-2
"""Largest probability of missing a pair whose similarity equals the threshold; extra candidates cost a comparison."""
_SHINGLE = 3
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_PROGRESS_AFTER_S = 3.0


def find_exact_duplicates(texts: Sequence[str]) -> list[list[int]]:
    """Return groups of two or more equal texts, as ascending indices, in the order of their first members."""
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        groups.setdefault(text, []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def find_near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[list[int]]:
    """Return groups of two or more texts, as indices, that are at least as similar to the group's first as `threshold`.

    Equal texts are included. A text joins the earliest group whose first text is near, so if only the first of each
    group is kept, every removed text is near to a kept one. `threshold` is in (0, 1].
    """
    index = NearIndex(threshold)
    groups: dict[int, list[int]] = {}
    for number, text in enumerate(_progress(texts, "Looking for near duplicates")):
        first = index.find_or_add(text, number)
        groups.setdefault(first, []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def find_near_matches(texts: Sequence[str], others: Sequence[str], threshold: float = 0.8) -> list[tuple[int, int]]:
    """Return (index in `texts`, index in `others`) for each text that is near or equal to one of the others.

    If some of the others are near each other, only the first of them is used.
    """
    index = NearIndex(threshold)
    for number, text in enumerate(_progress(others, "Reading what to compare with")):
        index.find_or_add(text, number)
    matches = [(number, index.find(text)) for number, text in enumerate(_progress(texts, "Looking for overlap"))]
    return [(number, match) for number, match in matches if match is not None]


class NearIndex:
    """Index texts by number, to find them by any near text."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH

        if not 0 < threshold <= 1:
            raise ValueError(f"a similarity threshold must be above 0 and at most 1, not {threshold}")
        self.threshold = threshold
        self._lsh = MinHashLSH(num_perm=_NUM_PERM, params=_bands(threshold))
        self._empty = MinHash(num_perm=_NUM_PERM, seed=_SEED, hashfunc=int)
        self._shingles: dict[int, Any] = {}
        self._exact: dict[str, int] = {}

    def find(self, text: str) -> int | None:
        """Return the number of the earliest near text, or None."""
        if text in self._exact:
            return self._exact[text]
        shingles = _shingles(text)
        return self._near(shingles, self._minhash(shingles)) if len(shingles) else None

    def find_or_add(self, text: str, number: int) -> int:
        """Return the number of the earliest near text; if there is none, add the text and return `number`."""
        if text in self._exact:
            return self._exact[text]
        shingles = _shingles(text)
        found = None
        if len(shingles):
            minhash = self._minhash(shingles)
            found = self._near(shingles, minhash)
            if found is None:
                self._lsh.insert(number, minhash)
                self._shingles[number] = shingles
        self._exact[text] = number if found is None else found
        return self._exact[text]

    def _near(self, shingles: Any, minhash: Any) -> int | None:
        candidates = sorted(self._lsh.query(minhash))
        return next((one for one in candidates if _jaccard(shingles, self._shingles[one]) >= self.threshold), None)

    def _minhash(self, shingles: Any) -> Any:
        minhash = self._empty.copy()
        minhash.update_batch(shingles)
        return minhash


def _bands(threshold: float) -> tuple[int, int]:
    """Return (bands, rows per band): the most rows for which a pair at the threshold is missed at most with _MISSED."""
    for rows in range(_NUM_PERM // 2, 0, -1):
        bands = _NUM_PERM // rows
        if (1 - threshold**rows) ** bands <= _MISSED:
            return bands, rows
    return _NUM_PERM, 1


def _shingles(text: str) -> Any:
    """Return the sorted, distinct hashes of all runs of three words; of the whole text if it has fewer words."""
    words = _WORD.findall(text.lower())
    runs = {" ".join(words[i : i + _SHINGLE]) for i in range(max(len(words) - _SHINGLE + 1, 1))} if words else set()
    return np.unique(np.fromiter((zlib.crc32(run.encode()) for run in runs), dtype=np.uint32, count=len(runs)))


def _jaccard(a: Any, b: Any) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _progress(texts: Iterable[str], what: str) -> Iterable[str]:
    bar: Iterable[str] = tqdm(texts, desc=what, unit="row", delay=_PROGRESS_AFTER_S, disable=None, leave=False)
    return bar
