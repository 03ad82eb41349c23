"""Make rows whose sequences share prefixes at several levels: a system prompt, questions, answers, follow-ups."""

import random

from rlqwen.packing.batch import Branch, Tree
from rlqwen.packing.prefix_trie import MIN_SHARED


def deep_trees(seed: int = 0, depth: int = 4) -> list[Tree]:
    """Return trees that share runs up to `depth` levels deep, and a few short, equal and empty branches."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(120) for _ in range(count)]

    def extend(before: list[int], level: int) -> list[list[int]]:
        """Return sequences that continue `before`, which share runs long enough to be found."""
        if level == depth:
            return [before + tokens(rng.choice([1, 5, MIN_SHARED + 7])) for _ in range(2)]
        runs = [tokens(rng.randint(MIN_SHARED, MIN_SHARED + 20)) for _ in range(rng.randint(1, 2))]
        return [sequence for run in runs for sequence in extend(before + run, level + 1)]

    sequences = extend([], 1)
    trees = []
    while sequences:
        count = rng.randint(1, 3)
        members, sequences = sequences[:count], sequences[count:]
        prefix = members[0][: rng.choice([0, 3, MIN_SHARED + 30, len(members[0]) - 1])]
        own = [one[len(prefix) :] if one[: len(prefix)] == prefix else tokens(40) for one in members]
        trees.append(Tree(prefix, [Branch(one, [rng.random() < 0.7 for _ in one]) for one in own]))
    trees[0].branches += [Branch([]), trees[0].branches[0]] if trees[0].prefix else [trees[0].branches[0]]
    return trees
