"""Which texts are the same, and which nearly: MinHash finds candidates, their true similarity decides.

Similarity is the Jaccard index of two texts' sets of character shingles, so it needs no word boundaries and serves
Chinese as well as English. Candidates come from locality-sensitive hashing of MinHash signatures (Broder 1997; the
datasketch library) and are then compared exactly, so no pair below the threshold is reported; one just above it may be
missed. Nothing is random: the same texts in the same order give the same answer on any machine.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

Hashes = npt.NDArray[np.uint32]

_SEED = 1
_PROGRESS_AFTER_S = 3.0
# Missing a pair costs more than looking at one in vain: (false positive, false negative).
_WEIGHTS = (0.1, 0.9)
_MAX_LSH_THRESHOLD = 0.95
"""Above it the library finds no two bands; candidates are compared anyway."""
# The standard error of an estimate from 128 permutations is at most 0.045.
_ESTIMATE_SLACK = 0.15
_HASHED_AT_ONCE = 8192
_EAST_ASIAN = 0x2E80
"""From this code point on a character says about as much as two Latin letters, and counts as two."""


def find_exact_duplicates(texts: Sequence[str]) -> list[list[int]]:
    """Groups of two or more indices of equal texts, each in order; groups in the order of their first."""
    places: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        places.setdefault(text, []).append(number)
    return [group for group in places.values() if len(group) > 1]


def find_near_duplicates(
    texts: Sequence[str],
    threshold: float = 0.8,
    *,
    num_perm: int = 128,
    shingle: int = 5,
    apart: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Groups of two or more indices: the first of a group, and the later texts that are nearly the same as it.

    A text joins the first earlier text that leads a group (or might) and is at least `threshold` similar to it, so
    every member resembles the leader, and no chain of small steps joins what differs. Texts for which `apart` has
    different values are never grouped.
    """
    index = NearIndex(threshold, num_perm=num_perm, shingle=shingle)
    groups: dict[int, list[int]] = {}
    for number, text in _with_progress(texts):
        kind = None if apart is None else apart[number]
        leader = index.find(text, kind)
        if leader is None:
            index.add(number, text, kind)
        else:
            groups.setdefault(leader, [leader]).append(number)
    return [groups[leader] for leader in sorted(groups)]


def find_near_matches(
    texts: Sequence[str],
    references: Sequence[str],
    threshold: float = 0.8,
    *,
    num_perm: int = 128,
    shingle: int = 5,
) -> dict[int, int]:
    """Index of a text -> index of the first reference that is at least `threshold` similar to it, where one is."""
    index = NearIndex(threshold, num_perm=num_perm, shingle=shingle)
    for number, text in _with_progress(references):
        index.add(number, text)
    found = ((number, index.find(text)) for number, text in _with_progress(texts))
    return {number: match for number, match in found if match is not None}


class NearIndex:
    """Texts that can be asked for one similar to another."""

    def __init__(self, threshold: float, *, num_perm: int, shingle: int) -> None:
        self.threshold = threshold
        self.shingle = shingle
        self._lsh = MinHashLSH(threshold=min(threshold, _MAX_LSH_THRESHOLD), num_perm=num_perm, weights=_WEIGHTS)
        self._empty = MinHash(num_perm=num_perm, seed=_SEED, hashfunc=int)
        self._texts: list[str] = []
        self._keys: list[tuple[int, Hashable]] = []
        self._signatures = np.empty((64, num_perm), np.uint32)
        self._latest: tuple[str, Hashes, MinHash] | None = None

    def add(self, number: int, text: str, kind: Hashable = None) -> None:
        """Hold `text` under `number`; only texts of the same `kind` are similar to it."""
        _, _, minhash = self._sketch(text)
        place = len(self._texts)
        if place == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[place] = minhash.hashvalues
        self._texts.append(text)
        self._keys.append((number, kind))
        self._lsh.insert(place, minhash, check_duplication=False)

    def find(self, text: str, kind: Hashable = None) -> int | None:
        """Number of the first text held that is similar enough, or None."""
        _, hashes, minhash = self._sketch(text)
        places = np.array(sorted(self._lsh.query(minhash)), np.int64)
        if not len(places):
            return None
        estimates = (self._signatures[places] == minhash.hashvalues).mean(axis=1)
        for place in places[estimates >= self.threshold - _ESTIMATE_SLACK]:
            number, its_kind = self._keys[place]
            if (
                its_kind == kind
                and _jaccard(hashes, shingle_hashes(self._texts[place], self.shingle)) >= self.threshold
            ):
                return number
        return None

    def _sketch(self, text: str) -> tuple[str, Hashes, MinHash]:
        """Shingles and signature; a text that was asked for is often added next."""
        if self._latest is None or self._latest[0] != text:
            hashes = shingle_hashes(text, self.shingle)
            minhash = self._empty.copy()
            for start in range(0, len(hashes), _HASHED_AT_ONCE):
                minhash.update_batch(hashes[start : start + _HASHED_AT_ONCE].tolist())
            self._latest = (text, hashes, minhash)
        return self._latest


def shingle_hashes(text: str, width: int) -> Hashes:
    """Distinct 32-bit hashes of all runs of `width` characters, in ascending order; case and spacing don't count.

    A polynomial rolling hash modulo 2^64, mixed down to its better half; a shorter text is one shingle.
    """
    plain = " ".join(text.casefold().split())
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    codes = np.repeat(codes, np.where(codes >= _EAST_ASIAN, 2, 1))
    width = min(width, max(len(codes), 1))
    if not len(codes):
        codes = np.zeros(1, np.uint64)
    hashes = np.zeros(len(codes) - width + 1, np.uint64)
    for place in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def _jaccard(left: Hashes, right: Hashes) -> float:
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def _with_progress(texts: Sequence[str]) -> Any:
    from tqdm import tqdm

    return tqdm(
        enumerate(texts), total=len(texts), desc="Comparing rows", unit="row", delay=_PROGRESS_AFTER_S, disable=None
    )
