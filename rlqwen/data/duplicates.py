"""Which texts are the same, or nearly the same.

Near means: the Jaccard similarity of two texts' sets of three consecutive words, in lower case and without
punctuation, is at least the threshold; a Chinese, Japanese or Korean character counts as a word. MinHash-LSH (Broder
1997; Leskovec et al., Mining of Massive Datasets, ch. 3) finds the candidates, exact similarity decides.
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
"""Largest chance that a pair as similar as the threshold is not found; a candidate too many costs a comparison."""
_SHINGLE = 3
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_PROGRESS_AFTER_S = 3.0


def find_exact_duplicates(texts: Sequence[str]) -> list[list[int]]:
    """Groups of two or more equal texts, by their indices, ascending; in the order of their first members."""
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        groups.setdefault(text, []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def find_near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[list[int]]:
    """Groups of two or more texts, by their indices, of which each is as similar as `threshold` to the group's first.

    Equal texts are near too. A text joins the earliest group whose first text it is near to, so keeping the first of
    each group and no other of it leaves no text without a near one. Similarity is in (0, 1].
    """
    index = NearIndex(threshold)
    groups: dict[int, list[int]] = {}
    for number, text in enumerate(_progress(texts, "Looking for near duplicates")):
        first = index.find_or_add(text, number)
        groups.setdefault(first, []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def find_near_matches(texts: Sequence[str], others: Sequence[str], threshold: float = 0.8) -> list[tuple[int, int]]:
    """(index in `texts`, index in `others`) of each text that is near, or equal, to one of the others.

    Of others that are near each other, the first stands for all.
    """
    index = NearIndex(threshold)
    for number, text in enumerate(_progress(others, "Reading what to compare with")):
        index.find_or_add(text, number)
    matches = [(number, index.find(text)) for number, text in enumerate(_progress(texts, "Looking for overlap"))]
    return [(number, match) for number, match in matches if match is not None]


class NearIndex:
    """Texts by number, found again by any text that is near."""

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
        """Number of the earliest text that is near, or None."""
        if text in self._exact:
            return self._exact[text]
        shingles = _shingles(text)
        return self._near(shingles, self._minhash(shingles)) if len(shingles) else None

    def find_or_add(self, text: str, number: int) -> int:
        """Number of the earliest text that is near; if there is none, the text is added and `number` comes back."""
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
    """(bands, rows a band): the longest bands of which a pair at the threshold shares at least one, but for _MISSED."""
    for rows in range(_NUM_PERM // 2, 0, -1):
        bands = _NUM_PERM // rows
        if (1 - threshold**rows) ** bands <= _MISSED:
            return bands, rows
    return _NUM_PERM, 1


def _shingles(text: str) -> Any:
    """Sorted hashes of the text's runs of three words, as a set; of fewer words, of all of them; empty if it has none."""
    words = _WORD.findall(text.lower())
    runs = {" ".join(words[i : i + _SHINGLE]) for i in range(max(len(words) - _SHINGLE + 1, 1))} if words else set()
    return np.unique(np.fromiter((zlib.crc32(run.encode()) for run in runs), dtype=np.uint32, count=len(runs)))


def _jaccard(a: Any, b: Any) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _progress(texts: Iterable[str], what: str) -> Iterable[str]:
    bar: Iterable[str] = tqdm(texts, desc=what, unit="row", delay=_PROGRESS_AFTER_S, disable=None, leave=False)
    return bar
