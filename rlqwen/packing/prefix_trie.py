"""Find the prefixes that sequences of tokens share, so that a packed row holds each of them once.

A trie whose nodes are runs of tokens: a sequence is a path from a root. A run that two sequences share is a node of its
own if it has at least MIN_SHARED tokens, and so is a prefix that is given, such as the prompt of a group, whatever its
length. What is found is used if it saves MIN_SAVED of the row, because each level of the trees costs every layer one more
call of attention.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from rlqwen.packing.row_layout import ROOT, Layout, Segment

MIN_SHARED = 32
"""Tokens of a run that is found, at least. Every chat begins with a few equal tokens, which are not worth a node."""
MIN_SAVED = 0.03
"""Share of a row's tokens that runs which are found must save together. On an H200 a cross call takes about as long as
this share of a row of 16,384 tokens; on a CPU it takes less."""


def is_worth_sharing(num_found: int, num_given: int) -> bool:
    """Return whether a row of `num_found` tokens is better than the `num_given` with only given prefixes shared."""
    return num_found <= (1 - MIN_SAVED) * num_given


class PrefixTrie:
    """Hold sequences of tokens, the runs that they share once; with `find` false, only those that are given.

    Example:
        trie = PrefixTrie()
        prompt = trie.add([5, 6, 7])
        leaves = [trie.add(answer, prompt) for answer in ([8, 9], [8, 10])]
        token_ids, layout = trie.lay_out(leaves)
    """

    def __init__(self, *, find: bool = True) -> None:
        self.find = find
        self.num_tokens = 0
        """Tokens of all runs."""
        self._runs: list[np.ndarray] = []
        self._parents: list[int] = []
        self._children: dict[int, list[int]] = {ROOT: []}
        self._by_start: dict[tuple[int, bytes], int] = {}
        """(parent, first MIN_SHARED tokens) -> the child that begins with them."""

    def add(self, token_ids: Sequence[int], parent: int = ROOT) -> int:
        """Add tokens that continue `parent`; return the node in which they end, which is `parent` if there are none."""
        rest = np.array(token_ids, dtype=np.int64)
        while len(rest):
            child = self._by_start.get((parent, rest[:MIN_SHARED].tobytes())) if self.find else None
            if child is None:
                return self._append(rest, parent)
            shared = _shared_length(self._runs[child], rest)
            parent = child if shared == len(self._runs[child]) else self._split(child, shared)
            rest = rest[shared:]
        return parent

    def _append(self, run: np.ndarray, parent: int) -> int:
        node = self._new_node(run, parent)
        self._children[parent].append(node)
        self.num_tokens += len(run)
        return node

    def _split(self, node: int, at: int) -> int:
        """Give the first `at` tokens of a node to a new one that takes its place; the node keeps the others."""
        run, parent = self._runs[node], self._parents[node]
        upper = self._new_node(run[:at], parent)
        siblings = self._children[parent]
        siblings[siblings.index(node)] = upper
        self._children[upper].append(node)
        self._runs[node], self._parents[node] = run[at:], upper
        self._name(node)
        return upper

    def _new_node(self, run: np.ndarray, parent: int) -> int:
        node = len(self._runs)
        self._runs.append(run)
        self._parents.append(parent)
        self._children[node] = []
        self._name(node)
        return node

    def _name(self, node: int) -> None:
        run = self._runs[node]
        if self.find and len(run) >= MIN_SHARED:
            self._by_start[self._parents[node], run[:MIN_SHARED].tobytes()] = node

    def lay_out(self, leaves: Sequence[int]) -> tuple[np.ndarray, Layout]:
        """Return the (T,) token ids of a row that holds every run once, and its layout for sequences that end in `leaves`."""
        number = {ROOT: ROOT}
        segments: list[Segment] = []
        runs: list[np.ndarray] = []
        place = 0
        for node in self._in_order():
            number[node] = len(segments)
            run = self._runs[node]
            segments.append(Segment(place, place + len(run), number[self._parents[node]]))
            runs.append(run)
            place += len(run)
        tokens = np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)
        return tokens, Layout(segments, [number[leaf] for leaf in leaves])

    def _in_order(self) -> Iterator[int]:
        """Yield each node before its children, and children in the order in which they were added."""
        waiting = self._children[ROOT][::-1]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += self._children[node][::-1]


def _shared_length(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many first tokens are equal."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
