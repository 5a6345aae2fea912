"""Bytes that live: counted by hand, and against what autograd really keeps."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from summerlm.plan.tally import Tally


def test_counts_what_lives_and_remembers_the_highest_moment():
    with Tally("a", "one") as tally:
        x = torch.zeros(100)  # 400 bytes
        tally.kind = "b"
        y = torch.zeros(50)  # 200
        z = x[10:]  # a view: nothing
        del y
        assert tally.now == 400
        tally.enter("two")
        w = x + 1
    assert tally.now == 800
    assert tally.peaks["one"].bytes == 600
    assert tally.peaks["one"].by_kind == {"a": 400, "b": 200}
    assert tally.peaks["two"].by_kind == {"a": 400, "b": 400}
    del x, w
    assert tally.now == 400, "a view keeps its memory"
    del z
    assert tally.now == 0


def test_a_result_may_change_its_kind():
    with Tally("work", "all") as tally:
        x = torch.zeros(10)
        tally.turn_into([x, torch.empty(0)], "result")
        y = torch.zeros(5)
    assert dict(tally.by_kind) == {"work": 20, "result": 40}
    del x, y
    assert tally.now == 0


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode], ids=["real", "fake"])
def test_what_autograd_keeps(mode):
    """After the forward pass lives what hooks see saved, and the result; weights are not ours."""
    with mode():
        net = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 5))
        x = torch.zeros(7, 20)
        outside = {t.untyped_storage()._cdata for t in (*net.parameters(), x)}
        saved = {}

        def keep(t):
            if t.untyped_storage()._cdata not in outside:
                saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with hooks, Tally("step", "all") as tally:
            y = net(x)
        assert sum(saved.values()) == 2 * 7 * 30 * 4  # before and after GELU
        assert tally.now == sum(saved.values()) + y.numel() * 4
