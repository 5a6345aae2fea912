"""The garbage collector runs between steps alone, and is as before afterwards."""

import gc
import weakref

import pytest

from summerlm.train import garbage
from summerlm.train.garbage import collects_between


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self):
        self.itself = self


@collects_between
def steps(count, made):
    for number in range(count):
        knot = Knot()
        made.append(weakref.ref(knot))
        del knot
        assert not gc.isenabled()
        yield number


def test_collections_come_between_steps(monkeypatch):
    monkeypatch.setattr(garbage, "STEPS", 3)
    made, alive = [], []
    for number in steps(7, made):
        assert number == len(alive)
        alive.append(sum(knot() is not None for knot in made))
    assert alive == [1, 2, 3, 1, 2, 3, 1]
    assert gc.isenabled()
    assert not gc.get_freeze_count()


@pytest.mark.parametrize("automatic", [True, False])
def test_the_collector_is_as_before_when_a_run_is_left(automatic):
    before = gc.isenabled()
    (gc.enable if automatic else gc.disable)()
    try:
        running = steps(7, [])
        next(running)
        running.close()
        assert gc.isenabled() is automatic
        assert not gc.get_freeze_count()
    finally:
        (gc.enable if before else gc.disable)()


def test_a_generator_that_ends_late_leaves_the_next_alone():
    """As after a rollback, whose traceback may hold the one before."""
    before, after = steps(3, []), steps(7, [])
    next(before)
    next(after)
    before.close()
    assert not gc.isenabled()
    after.close()
    assert gc.isenabled()
    assert not gc.get_freeze_count()
