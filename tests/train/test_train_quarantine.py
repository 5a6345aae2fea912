"""Quarantined rows: whose they are, who masks them, and that the table outlives the run."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from data_streams import make_loader, take

from summerlm.core.errors import DivergedError, UsageError
from summerlm.core.ranks import ALONE, Ranks
from summerlm.data.batch import IGNORE
from summerlm.train.quarantine import MAX_ROLLBACKS, Quarantine, Rollback, offending


@pytest.fixture
def path(tmp_path):
    return tmp_path / "quarantine.json"


def test_offending_rows_are_those_beyond_the_limit_in_global_order():
    nats = [[30.0, 90.0, 20.0], [10.0, 40.0, 0.0]]  # global rows 0 2 4, and 1 3 5
    targets = [[10, 10, 10], [10, 4, 0]]
    assert offending(nats, targets, limit=8.0) == [2, 3]
    assert offending(nats, targets, limit=3.0) == [2, 3], "the limit itself is borne"
    assert offending(nats, targets, limit=2.9) == [0, 2, 3]


def test_a_row_that_is_not_finite_offends():
    assert offending([[1.0, math.nan, math.inf]], [[1, 1, 1]], limit=5.0) == [1, 2]


def test_where_no_row_is_beyond_the_limit_all_that_count_offend():
    assert offending([[1.0, 2.0, 0.0], [1.0, 0.0, 3.0]], [[1, 1, 0], [1, 0, 1]], 9.0) == [
        0,
        1,
        2,
        5,
    ]


def test_the_table_is_written_at_once_and_read_again(path):
    quarantine = Quarantine(path, ALONE)
    assert quarantine.rows(7) == []
    assert not path.exists()
    quarantine.add([(7, 11), (7, 2), (9, 0)])
    quarantine.add([(7, 2), (8, 1)])
    table = json.loads(path.read_text())
    assert table == {"rollbacks": 2, "rows": [[7, 2], [7, 11], [8, 1], [9, 0]]}
    again = Quarantine(path, ALONE)
    assert again.rollbacks == 2
    assert [again.rows(step) for step in (6, 7, 8, 9)] == [[], [2, 11], [1], [0]]


def test_asking_changes_no_table(path):
    quarantine = Quarantine(path, ALONE)
    quarantine.add([(7, 2)])
    before = path.read_bytes()
    assert quarantine.rows(5) == []
    (step,) = take(make_loader(), 1)
    quarantine.mask(step.batch, 5)
    quarantine.add([(7, 2)])
    assert json.loads(path.read_text())["rows"] == json.loads(before)["rows"]


def test_a_run_goes_back_so_often_and_no_more(path):
    for number in range(MAX_ROLLBACKS):
        Quarantine(path, ALONE).add([(number, 0)])
    before = path.read_bytes()
    with pytest.raises(DivergedError, match=f"after going back {MAX_ROLLBACKS} times") as error:
        Quarantine(path, ALONE).add([(50, 0)])
    assert error.value.exit_code == 9
    assert path.read_bytes() == before


def test_only_the_leading_rank_writes_and_all_know(path):
    other = Quarantine(path, Ranks(rank=1, world=2, local_rank=1))
    other.add([(3, 1)])
    assert not path.exists()
    assert other.rows(3) == [1]
    Quarantine(path, Ranks(rank=0, world=2)).add([(3, 1)])
    assert path.exists()


@pytest.mark.parametrize("rows", [12, 24])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 12])
def test_the_same_rows_are_masked_in_every_world(world, rows, path):
    """By a loader's own dealing: the rows of all ranks, masked, are those of a world of one."""
    wanted = [0, 5, 7, rows - 1]
    Quarantine(path, ALONE).add([*((2, row) for row in wanted), (3, 1)])
    (_, whole) = take(make_loader(rows=rows), 2)
    found = np.zeros((rows, 40))
    for rank in range(world):
        loader = make_loader(rows=rows, rank=rank, world=world)
        first, second = take(loader, 2)
        quarantine = Quarantine(path, Ranks(rank=rank, world=world))
        assert quarantine.mask(first.batch, 1) is first.batch
        masked = quarantine.mask(second.batch, 2)
        for name in ("tokens", "documents", "sources"):
            assert torch.equal(getattr(masked, name), getattr(second.batch, name))
        assert (second.batch.targets != IGNORE).any(dim=1).all(), "the loader's own is untouched"
        for ids, targets in zip(second.ids, masked.targets, strict=True):
            (row,) = np.flatnonzero((whole.ids == ids).all(axis=1))
            found[row] = targets.numpy()
    expected = whole.batch.targets.clone()
    expected[wanted] = IGNORE
    assert np.array_equal(found, expected.numpy())


def test_a_rollback_says_where_and_is_no_error_of_the_user():
    rollback = Rollback(31, [4, 9])
    assert (rollback.step, rollback.rows) == (31, [4, 9])
    assert str(rollback) == "step 31 spiked at its rows 4, 9"
    assert isinstance(rollback, Exception)


@pytest.mark.parametrize(
    "text", ["", "[", "[]", '{"rows": []}', '{"rollbacks": 1, "rows": 1}', '{"rollbacks": 1}']
)
def test_a_damaged_table_is_told(text, path):
    path.write_text(text)
    with pytest.raises(UsageError, match=r"quarantine\.json"):
        Quarantine(path, ALONE)


def test_a_pass_over_many_steps_masks_nothing_twice(path):
    quarantine = Quarantine(path, ALONE)
    quarantine.add(itertools.product(range(1, 4), range(12)))
    for step in take(make_loader(), 5):
        masked = quarantine.mask(step.batch, step.number)
        assert bool((masked.targets == IGNORE).all()) == (step.number < 4)
