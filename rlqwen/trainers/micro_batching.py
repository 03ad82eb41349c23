"""Divide an update's rows among ranks and micro-batches.

Every rank holds the rows of the whole update and computes all shares by the same rule. So each knows without asking how
many micro-batches the others have, and makes up the difference with idle ones.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rlqwen.algorithms.loss_metrics import add_on_device
from rlqwen.distributed import Ranks
from rlqwen.packing.batch import PackedBatch, Tree, idle_batch, pack, split_trees


def micro_batches(
    trees: Sequence[Tree],
    ranks: Ranks,
    *,
    max_branches: int | None = None,
    max_tokens: int | None = None,
    divisible: bool = True,
) -> Iterator[PackedBatch]:
    """Yield this rank's micro-batches of `trees`; with idle ones at the end, every rank has equally many.

    The limits are those of `split_trees`. With a limit on tokens, ranks get equal shares of tokens, else of branches.
    """
    shares = share_trees(trees, ranks.data_size, by_tokens=max_tokens is not None, divisible=divisible)
    parts = [
        list(split_trees(share, max_branches=max_branches, max_tokens=max_tokens, divisible=divisible))
        for share in shares
    ]
    return pack_share(parts, ranks)


def arriving_micro_batches(
    trees: Iterable[Tree], ranks: Ranks, *, max_branches: int | None = None, max_tokens: int | None = None
) -> Iterator[PackedBatch]:
    """Yield this rank's micro-batches of trees that arrive one by one, as soon as every rank has one.

    One rank gets the same ones as from `micro_batches`. Of several, which see the trees in the same order, each gets the
    next micro-batch in turn, and an idle one if the last are fewer than the ranks.
    """
    parts = split_trees(trees, max_branches=max_branches, max_tokens=max_tokens)
    while turn := list(islice(parts, ranks.data_size)):
        own = turn[ranks.data_rank : ranks.data_rank + 1]
        yield pack(own[0]) if own else idle_batch(turn[0][0])


def pack_share(parts: Sequence[Sequence[Sequence[Tree]]], ranks: Ranks) -> Iterator[PackedBatch]:
    """Yield this rank's micro-batches, packed, and idle ones up to the number of the rank that has the most.

    `parts`: for each rank, the trees of its micro-batches.
    """
    own, longest = parts[ranks.data_rank], max(parts, key=len)
    yield from map(pack, own)
    for part in longest[len(own) :]:
        yield idle_batch(part[0])


def share_trees(
    trees: Sequence[Tree], num_ranks: int, *, by_tokens: bool = False, divisible: bool = True
) -> list[list[Tree]]:
    """Return a run of trees per rank, of about as many branches, or packed tokens, as those of other ranks.

    The row of all branches is cut into equal lengths. So a tree stays whole, and its prefix is computed once, unless a
    cut falls into it; a tree that is not `divisible` goes to the rank that holds its middle.
    """
    if num_ranks == 1:
        return [list(trees)]
    pieces = [
        (place, piece, piece.num_tokens - (len(tree.prefix) if number else 0) if by_tokens else len(piece.branches))
        for place, tree in enumerate(trees)
        for number, piece in enumerate(_pieces(tree) if divisible else [tree])
    ]
    total = sum(weight for _, _, weight in pieces)
    shares: list[dict[int, Tree]] = [{} for _ in range(num_ranks)]
    before = 0
    for place, piece, weight in pieces:
        rank = min((2 * before + weight) * num_ranks // (2 * total), num_ranks - 1)
        before += weight
        if place in shares[rank]:
            shares[rank][place].branches.extend(piece.branches)
        else:
            shares[rank][place] = piece
    return [list(share.values()) for share in shares]


def count_tokens(batches: Sequence[PackedBatch]) -> float:
    """Return the tokens of the rows that have something to train on."""
    return float(sum(batch.num_tokens for batch in batches if batch.num_sequences))


def add_up(sums: dict[str, Tensor | float], more: Mapping[str, Tensor | float]) -> None:
    """Add to sums by name; tensors are added up on their device, for `read_scalars` to read in the end."""
    for key, value in more.items():
        before = sums.get(key, 0.0)
        sums[key] = add_on_device(before, value) if isinstance(value, Tensor) else before + value


def _pieces(tree: Tree) -> list[Tree]:
    return [replace(tree, branches=[branch]) for branch in tree.branches]


def save_batches(folder: Path, batches: Sequence[PackedBatch], *, step: int, rank: int) -> None:
    """Write the tensors of an update's micro-batches to `folder`, for people to look at later."""
    folder.mkdir(exist_ok=True)
    name = f"step-{step:06d}" + (f"-rank{rank}" if rank else "")
    for number, batch in enumerate(batches):
        save_file(batch.tensors(), folder / f"{name}-{number}.safetensors")
