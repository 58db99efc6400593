"""Integer tables, worked out by hand: runs of copies, and the blocks of stencils."""

from __future__ import annotations

import pytest
import torch

from gradkern.codegen.tables import Tables, offsets, stencil, strided, transpose_entries
from gradkern.codegen.units import MoveEnd, Node


def test_equal_tables_are_stored_once():
    tables = Tables()
    assert [tables.add(t) for t in ([1, 2], [3], [1, 2], [1, 2, 3])] == [0, 2, 0, 3]
    assert tables.integers == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("read", "write", "runs"),
    [
        ([], [], []),
        ([7], [3], [7, 3, 1, 1, 1]),
        ([0, 1, 2, 3], [10, 11, 12, 13], [0, 10, 4, 1, 1]),
        ([0, 4, 8], [0, 1, 2], [0, 0, 3, 4, 1]),
        ([5, 6, 0, 1], [0, 1, 2, 3], [5, 0, 2, 1, 1, 0, 2, 2, 1, 1]),
        ([0, 1, 2], [2, 1, 0], [2, 0, 3, -1, 1]),
    ],
    ids=["nothing", "one", "a line", "a column", "two halves exchanged", "reversed, in the order of the destination"],
)
def test_pairs_of_offsets_become_runs_of_equal_steps(read: list[int], write: list[int], runs: list[int]):
    """Each run is: source offset, destination offset, count, source step, destination step."""
    assert strided(torch.tensor(read, dtype=torch.int64), torch.tensor(write, dtype=torch.int64)) == runs


def test_offsets_of_a_value_follow_its_channels_last_storage():
    node = Node(0, C=2, H=1, W=3)
    node.halo = [0, 0, 1, 0]  # one position before each row
    assert offsets(node, MoveEnd((2, 3), channels_last=False)).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert offsets(node, MoveEnd((3, 2), channels_last=True)).tolist() == [[0, 1], [2, 3], [4, 5]]


#: A kernel of three over three positions of two channels, padded: (offset of the read, row of weights) per position.
PADDED = [[(0, 1), (2, 2)], [(0, 0), (2, 1), (4, 2)], [(2, 0), (4, 1)]]


def test_transposed_entries_list_the_results_that_read_each_position():
    node = Node(0, C=2, H=1, W=3)
    assert transpose_entries(PADDED, node, node) == [[(0, 1), (2, 0)], [(0, 2), (2, 1), (4, 0)], [(2, 2), (4, 1)]]


def test_positions_with_equal_reads_are_one_block():
    """Blocks of (read offset, place, count, read step, place step, first entry, entries), then the entries."""
    shifted = [[(2 * p, 0), (2 * p + 2, 1)] for p in range(3)]  # the same two reads, one position further on each
    blocks, entries = stencil(shifted, [0, 2, 4], keep_empty=False)
    assert blocks == [0, 0, 3, 2, 2, 0, 2]
    assert entries == [0, 0, 2, 1]  # relative to the first read
    blocks, entries = stencil(PADDED, [0, 2, 4], keep_empty=False)
    assert blocks == [0, 0, 1, 0, 0, 0, 2, 0, 2, 1, 0, 0, 2, 3, 2, 4, 1, 0, 0, 5, 2]
    assert entries == [0, 1, 2, 2, 0, 0, 2, 1, 4, 2, 0, 0, 2, 1]


def test_positions_without_reads_are_kept_only_where_they_must_be_written():
    entries = [[(0, 0)], [], [(4, 0)]]
    assert stencil(entries, [0, 2, 4], keep_empty=False)[0] == [0, 0, 1, 0, 0, 0, 1, 4, 4, 1, 0, 0, 0, 1]
    assert stencil(entries, [0, 2, 4], keep_empty=True)[0][7:14] == [0, 2, 1, 0, 0, 1, 0]
