"""Pack sequences in one row of tokens: each prompt once, then its continuations.

A `Tree` is a prefix and the branches that continue it: a prompt and its G completions (GRPO, PPO), a prompt and its
chosen and rejected answers (DPO), or a whole sequence as the only branch of an empty prefix (SFT). `pack` lays out
trees in one row, so that linear layers compute neither padding nor a prompt twice; only attention
(rlqwen.packing.attention) needs to know which tokens may see which.

Shapes: T tokens in the row, N target tokens (those with a loss), S sequences (branches).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlqwen.packing.row_layout import Layout, Span, send

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
        """Return the tokens that the tree takes in a packed row."""
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
    row = _Row()
    for tree in trees:
        if tree.branches:
            row.add(tree)
    if not row.spans:
        raise ValueError("nothing to pack: no tree has a branch")
    branches = [branch for tree in trees for branch in tree.branches]
    return PackedBatch(
        input_ids=_tensor(row.token_ids, np.int64)[None],
        position_ids=_tensor(row.positions, np.int64)[None],
        layout=Layout(row.spans),
        source_N=_tensor(row.sources, np.int64),
        target_N=_tensor(row.targets, np.int64),
        sequence_N=torch.repeat_interleave(torch.arange(len(row.lengths)), torch.tensor(row.lengths)),
        lengths_S=torch.tensor(row.lengths, dtype=torch.float32),
        per_token=Columns(
            {
                name: _tensor(
                    [values[place] for values, places in zip(column, row.kept, strict=True) for place in places],
                    np.float32,
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
        experts_TLK=_experts(trees, len(row.token_ids)),
    )


def _tensor(values: Sequence[float], dtype: type[np.int64] | type[np.float32]) -> Tensor:
    """Return the values as a tensor, made by NumPy, which reads a list in a third of PyTorch's time."""
    return torch.from_numpy(np.array(values, dtype=dtype))


def _shared_columns(values: Sequence[Mapping[str, T]]) -> dict[str, list[T]]:
    """Return the columns that every branch has, each as a list over the branches."""
    return {name: [one[name] for one in values] for name in values[0] if all(name in one for one in values)}


def _experts(trees: Sequence[Tree], num_tokens: int) -> Tensor | None:
    """Return the (T, L, K) recorded experts of a row of these trees; None if nothing is recorded."""
    parts: list[tuple[int, np.ndarray]] = []
    place = 0
    for tree in trees:
        if not tree.branches:
            continue
        recorded = [(len(tree.prefix), tree.prefix_experts)]
        recorded += [(len(branch.token_ids), branch.experts) for branch in tree.branches]
        for count, experts in recorded:
            if experts is not None and count:
                parts.append((place, experts[:count]))
            place += count
    if not parts:
        return None
    whole = np.full((num_tokens, *parts[0][1].shape[1:]), -1, dtype=np.int16)
    for start, experts in parts:
        whole[start : start + len(experts)] = experts
    return torch.from_numpy(whole)


@dataclass(slots=True)
class _Row:
    """Build a row tree by tree, in lists, because a tensor per element would cost more than the forward."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    """Indices of each branch's targets among its tokens."""

    def add(self, tree: Tree) -> None:
        prefix_start = len(self.token_ids)
        self.token_ids += tree.prefix
        self.positions += range(len(tree.prefix))
        prefix_end = len(self.token_ids)
        for branch in tree.branches:
            start = len(self.token_ids)
            self.token_ids += branch.token_ids
            self.positions += range(len(tree.prefix), len(tree.prefix) + len(branch.token_ids))
            self.spans.append(Span(prefix_start, prefix_end, start, len(self.token_ids)))
            self._add_targets(branch, start, before=prefix_end - 1 if tree.prefix else None)

    def _add_targets(self, branch: Branch, start: int, before: int | None) -> None:
        """Add the targets of a branch; `before`: row index of the token that predicts its first, None if there is none."""
        kept = _targets(branch, has_prefix=before is not None)
        self.sources += [start + i - 1 if i > 0 else before for i in kept]  # type: ignore[misc]
        self.targets += [branch.token_ids[i] for i in kept]
        self.lengths.append(len(kept))
        self.kept.append(kept)


def _targets(branch: Branch, *, has_prefix: bool) -> list[int]:
    """Return the indices of the branch's tokens that are targets."""
    mask = branch.loss_mask
    return [i for i in range(0 if has_prefix else 1, len(branch.token_ids)) if mask is None or mask[i]]


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
    branches = tokens = 0
    for tree in trees:
        whole = not divisible or fits(len(tree.branches), tree.num_tokens, max_branches, max_tokens)
        pieces = [tree] if whole else [replace(tree, branches=[branch]) for branch in tree.branches]
        for piece in pieces:
            joins = not whole and bool(current) and current[-1].prefix is piece.prefix
            cost = piece.num_tokens - (len(piece.prefix) if joins else 0)
            if current and not fits(branches + len(piece.branches), tokens + cost, max_branches, max_tokens):
                yield current
                current, branches, tokens, joins = [], 0, 0, False
                cost = piece.num_tokens
            if joins:
                current[-1].branches += piece.branches
            else:
                current.append(piece)
            branches += len(piece.branches)
            tokens += cost
            if branches == max_branches:  # the trees may still be coming
                yield current
                current, branches, tokens = [], 0, 0
    if current:
        yield current


def fits(branches: int, tokens: int, max_branches: int | None, max_tokens: int | None) -> bool:
    return (max_branches is None or branches <= max_branches) and (max_tokens is None or tokens <= max_tokens)
