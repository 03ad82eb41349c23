"""Pack sequences in one row of tokens, each shared prefix once.

A `Tree` is a prefix and the branches that continue it: a prompt and its G completions (GRPO, PPO), a prompt and its
chosen and rejected answers (DPO), or a whole sequence as the only branch of an empty prefix (SFT). `pack` lays out
trees in one row, so that linear layers compute neither padding nor a prompt twice; only attention
(rlqwen.packing.attention) needs to know which tokens may see which. What trees and branches share beyond that, such as a
system prompt or earlier turns, is found by its token ids (rlqwen.packing.prefix_trie).

Shapes: T tokens in the row, N target tokens (those with a loss), S sequences (branches).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlqwen.packing.prefix_trie import PrefixTrie, is_worth_sharing
from rlqwen.packing.row_layout import ROOT, Layout, send

T = TypeVar("T")


class Columns(dict[str, Tensor]):
    """Hold tensors of a packed batch by name, all of one length; a missing name raises a KeyError that lists them."""

    def __missing__(self, name: str) -> Tensor:
        raise KeyError(f"the packed batch has no column {name!r}; it has {', '.join(map(repr, self)) or 'none'}")


@dataclass(slots=True)
class Branch:
    """Hold one continuation of a prefix."""

    token_ids: list[int]
    loss_mask: list[bool] | None = None
    """Whether each token is a target; None: all are. Without a prefix, the first token is not: nothing predicts it."""
    per_token: dict[str, list[float]] = field(default_factory=dict)
    """Column name -> one value per token, such as `sampler_logp`, the sampler's log-probability."""
    per_sequence: dict[str, float | bool] = field(default_factory=dict)
    """Column name -> one value for the whole branch, such as `advantage` or `label`."""
    experts: np.ndarray | None = None
    """(tokens, L, K) experts that the sampler chose for each token in each decoder layer; may lack the last tokens."""


@dataclass(slots=True)
class Tree:
    """Hold a prefix and the branches that continue it."""

    prefix: list[int]
    branches: list[Branch]
    prefix_experts: np.ndarray | None = None
    """(tokens, L, K) experts that the sampler chose for the prefix."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens that the tree takes in a packed row, if it shares no more than its prefix."""
        return len(self.prefix) + sum(len(branch.token_ids) for branch in self.branches)

    @property
    def target_counts(self) -> list[int]:
        """Return the number of target tokens of each branch."""
        return [len(_targets(branch, has_prefix=bool(self.prefix))) for branch in self.branches]


@dataclass(slots=True)
class PackedBatch:
    """Hold one micro-batch, ready for the model's forward.

    Further inputs of an algorithm are named columns: one value per target token, or one per sequence.
    """

    input_ids: Tensor
    """(1, T) long."""
    position_ids: Tensor
    """(1, T) long; a branch continues the positions of its prefix."""
    layout: Layout
    source_N: Tensor
    """(N,) index in the row of the token whose hidden state predicts the target."""
    target_N: Tensor
    """(N,) token ids."""
    sequence_N: Tensor
    """(N,) which sequence, 0 to S-1, a target belongs to; ascending."""
    lengths_S: Tensor
    """(S,) float: targets in each sequence."""
    per_token: Columns = field(default_factory=Columns)
    """Column name -> (N,) values of the targets."""
    per_sequence: Columns = field(default_factory=Columns)
    """Column name -> (S,) values of the sequences."""
    experts_TLK: Tensor | None = None
    """(T, L, K) int16: experts to choose in each decoder layer, -1 if not recorded; None: the routers choose."""

    @property
    def num_tokens(self) -> int:
        """Return T, the tokens of the forward."""
        return self.input_ids.shape[1]

    @property
    def num_targets(self) -> int:
        """Return N, the tokens that have a loss."""
        return self.target_N.shape[0]

    @property
    def num_sequences(self) -> int:
        """Return S, the branches."""
        return self.lengths_S.shape[0]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the same batch on another device, with columns of its own."""
        fields: dict[str, Any] = {name: send(value, device) for name, value in self._fields().items()}
        per_token, per_sequence = (
            Columns({name: send(value, device) for name, value in columns.items()})
            for columns in (self.per_token, self.per_sequence)
        )
        layout = self.layout.to(device)
        return replace(self, layout=layout, per_token=per_token, per_sequence=per_sequence, **fields)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, columns with the suffix of their shape; those of the layout are left out."""
        per_token = {f"{name}_N": value for name, value in self.per_token.items()}
        per_sequence = {f"{name}_S": value for name, value in self.per_sequence.items()}
        return self._fields() | per_token | per_sequence

    def _fields(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def pack(trees: Sequence[Tree]) -> PackedBatch:
    """Lay `trees` out in one row; the batch gets the columns that every branch has.

    Raises ValueError if there is nothing to pack.
    """
    trees = [tree for tree in trees if tree.branches]
    if not trees:
        raise ValueError("nothing to pack: no tree has a branch")
    token_ids_T, layout = _lay_out(trees)
    sources, targets, kept = _find_targets(trees, layout)
    lengths_S = torch.tensor([len(places) for places in kept])
    branches = [branch for tree in trees for branch in tree.branches]
    return PackedBatch(
        input_ids=torch.from_numpy(token_ids_T)[None],
        position_ids=torch.from_numpy(layout.positions())[None],
        layout=layout,
        source_N=torch.from_numpy(np.concatenate(sources)),
        target_N=torch.from_numpy(np.concatenate(targets)),
        sequence_N=torch.repeat_interleave(torch.arange(len(kept)), lengths_S),
        lengths_S=lengths_S.float(),
        per_token=Columns(
            {
                name: torch.from_numpy(
                    np.concatenate([np.array(v, dtype=np.float32)[p] for v, p in zip(column, kept, strict=True)])
                )
                for name, column in _shared_columns([branch.per_token for branch in branches]).items()
            }
        ),
        per_sequence=Columns(
            {
                name: torch.tensor(column, dtype=torch.bool if isinstance(column[0], bool) else torch.float32)
                for name, column in _shared_columns([branch.per_sequence for branch in branches]).items()
            }
        ),
        experts_TLK=_experts(trees, layout),
    )


def _lay_out(trees: Sequence[Tree]) -> tuple[np.ndarray, Layout]:
    """Return the (T,) token ids of a row of these trees, and its layout."""
    given = sum(tree.num_tokens for tree in trees)
    for trie in (PrefixTrie(), PrefixTrie(find=False)):
        leaves = [leaf for tree in trees for leaf in _add_tree(trie, tree)[1]]
        if trie.num_tokens == given or is_worth_sharing(trie.num_tokens, given):
            break
    return trie.lay_out(leaves)


def _add_tree(trie: PrefixTrie, tree: Tree, prefix: int | None = None) -> tuple[int, list[int]]:
    """Add a tree, or its branches to the `prefix` that is there; return the node of the prefix and those of the branches."""
    if prefix is None:
        prefix = trie.add(tree.prefix)
    return prefix, [trie.add(branch.token_ids, prefix) for branch in tree.branches]


def _find_targets(trees: Sequence[Tree], layout: Layout) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Return for each branch the row indices that predict its targets, their token ids, and their places in the branch."""
    sources, targets, kept = [], [], []
    for tree, branch, leaf in _branches(trees, layout):
        count = len(branch.token_ids)
        places = _targets(branch, has_prefix=bool(tree.prefix))
        rows = layout.rows(leaf, count + 1)
        # Without a prefix nothing predicts the first token, which is no target.
        sources.append(rows[places] if tree.prefix else rows[places - 1])
        targets.append(np.array(branch.token_ids, dtype=np.int64)[places])
        kept.append(places)
    return sources, targets, kept


def _branches(trees: Sequence[Tree], layout: Layout) -> Iterator[tuple[Tree, Branch, int]]:
    """Yield each branch with its tree and the segment in which it ends."""
    leaves = iter(layout.leaves)
    for tree in trees:
        for branch in tree.branches:
            yield tree, branch, next(leaves)


def _shared_columns(values: Sequence[Mapping[str, T]]) -> dict[str, list[T]]:
    """Return the columns that every branch has, each as a list over the branches."""
    return {name: [one[name] for one in values] for name in values[0] if all(name in one for one in values)}


def _experts(trees: Sequence[Tree], layout: Layout) -> Tensor | None:
    """Return the (T, L, K) recorded experts of a row of these trees; None if nothing is recorded."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for tree, branch, leaf in _branches(trees, layout):
        if tree.prefix_experts is None and branch.experts is None:
            continue
        rows = layout.rows(leaf)
        for experts, places in (
            (tree.prefix_experts, rows[: len(tree.prefix)]),
            (branch.experts, rows[len(tree.prefix) :]),
        ):
            if experts is not None and len(places):
                parts.append((places[: len(experts)], experts[: len(places)]))
    if not parts:
        return None
    whole = np.full((layout.num_tokens, *parts[0][1].shape[1:]), -1, dtype=np.int16)
    for places, experts in parts:
        whole[places] = experts
    return torch.from_numpy(whole)


def _targets(branch: Branch, *, has_prefix: bool) -> np.ndarray:
    """Return the indices of the branch's tokens that are targets."""
    first = 0 if has_prefix else 1
    if branch.loss_mask is None:
        return np.arange(first, max(len(branch.token_ids), first))
    return first + np.flatnonzero(np.array(branch.loss_mask[first : len(branch.token_ids)], dtype=bool))


def idle_batch(tree: Tree) -> PackedBatch:
    """Return a micro-batch like those of `tree`, with tokens in its row but neither targets nor sequences.

    Every loss on it is 0, with a gradient of 0 for every weight. A rank forwards it while others have work, because
    ranks that hold shards of the weights must all run the same forwards.
    """
    first = tree.branches[0]
    per_token = {name: values[:1] for name, values in first.per_token.items()}
    branch = replace(first, token_ids=first.token_ids[:1], loss_mask=None, per_token=per_token, experts=None)
    batch = pack([Tree(tree.prefix[:1], [branch])])
    return replace(
        batch,
        source_N=batch.source_N[:0],
        target_N=batch.target_N[:0],
        sequence_N=batch.sequence_N[:0],
        lengths_S=batch.lengths_S[:0],
        per_token=Columns({name: values[:0] for name, values in batch.per_token.items()}),
        per_sequence=Columns({name: values[:0] for name, values in batch.per_sequence.items()}),
    )


def split_trees(
    trees: Iterable[Tree], *, max_branches: int | None = None, max_tokens: int | None = None, divisible: bool = True
) -> Iterator[list[Tree]]:
    """Split a sequence of trees into micro-batches of at most `max_branches` sequences and `max_tokens` packed tokens.

    A tree stays whole if it fits in a micro-batch; otherwise its branches are divided, and each micro-batch with some
    of them repeats the prefix. A sequence longer than `max_tokens` gets its own micro-batch, and so does a larger tree if
    trees are not `divisible`, because a loss compares their branches.
    """
    current: list[Tree] = []
    size = _RowSize()
    for tree in trees:
        whole = not divisible or fits(len(tree.branches), tree.num_tokens, max_branches, max_tokens)
        for piece in [tree] if whole else [replace(tree, branches=[branch]) for branch in tree.branches]:
            joins = not whole and bool(current) and current[-1].prefix is piece.prefix
            size.add(piece, joins=joins, count_tokens=max_tokens is not None)
            if current and not fits(size.branches, size.tokens, max_branches, max_tokens):
                yield current
                current, size, joins = [], _RowSize(), False
                size.add(piece, joins=False, count_tokens=max_tokens is not None)
            if joins:
                current[-1].branches += piece.branches
            else:
                current.append(piece)
            if size.branches == max_branches:  # the trees may still be coming
                yield current
                current, size = [], _RowSize()
    if current:
        yield current


class _RowSize:
    """Count the branches and tokens of a row while trees are added to it."""

    def __init__(self) -> None:
        self.branches = 0
        self._given = 0
        self._trie = PrefixTrie()
        self._prefix = ROOT

    def add(self, tree: Tree, *, joins: bool, count_tokens: bool) -> None:
        """Add a tree, or if it `joins`, more branches of the last one."""
        self.branches += len(tree.branches)
        if count_tokens:
            self._given += tree.num_tokens - (len(tree.prefix) if joins else 0)
            self._prefix, _ = _add_tree(self._trie, tree, self._prefix if joins else None)

    @property
    def tokens(self) -> int:
        """Return the tokens of the row that `pack` makes."""
        return self._trie.num_tokens if is_worth_sharing(self._trie.num_tokens, self._given) else self._given


def fits(branches: int, tokens: int, max_branches: int | None, max_tokens: int | None) -> bool:
    return (max_branches is None or branches <= max_branches) and (max_tokens is None or tokens <= max_tokens)
