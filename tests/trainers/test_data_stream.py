"""Test the order of rows over epochs and its restoration."""

import pytest

from rlqwen.errors import DataError
from rlqwen.trainers.data_stream import RowStream


def test_every_epoch_has_every_row_once_in_a_new_order() -> None:
    stream = RowStream(list(range(10)), seed=0, shuffle=True)
    taken = stream.take(30)
    epochs = [taken[:10], taken[10:20], taken[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_resumed_stream_repeats_and_loses_no_row() -> None:
    whole = RowStream(list(range(7)), seed=3, shuffle=True).take(20)
    first = RowStream(list(range(7)), seed=3, shuffle=True)
    head = first.take(9)
    tail = RowStream(list(range(7)), seed=3, shuffle=True, position=first.position).take(11)
    assert head + tail == whole


def test_unshuffled_rows_keep_their_order() -> None:
    assert RowStream("abc", seed=0, shuffle=False).take(5) == ["a", "b", "c", "a", "b"]


def test_an_epoch_that_ends_inside_a_batch_is_noticed() -> None:
    stream = RowStream(list(range(5)), seed=0, shuffle=False)
    ends = []
    for _ in range(5):
        stream.take(3)
        ends.append(stream.ended_epoch(3))
    assert ends == [False, True, False, True, True]


def test_empty_training_data_is_refused() -> None:
    with pytest.raises(DataError, match="no training rows"):
        RowStream([], seed=0, shuffle=True)
