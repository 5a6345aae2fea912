"""Time, money and saves against sums done by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from summerlm.core.hardware import ACCELERATORS, find_accelerator
from summerlm.plan.cost import FAILURE_HOURS, Devices, lost_share, save_interval_s


def test_days_and_dollars():
    devices = Devices(count=8, flops=1e14, price=2.0)
    assert devices.days(8 * 1e14 * 86_400) == 1
    assert devices.dollars(1) == 8 * 24 * 2
    assert Devices(8, 1e14, None).dollars(1) is None


@given(st.floats(1, 1e6))
def test_a_budget_buys_what_it_costs(dollars):
    devices = Devices(3, 5e14, 1.7)
    flops = devices.flops_for(dollars=dollars)
    assert devices.dollars(devices.days(flops)) == pytest.approx(dollars)
    assert devices.days(devices.flops_for(days=dollars)) == pytest.approx(dollars)


def test_failures_of_llama_3():
    """419 interruptions in 54 days of 16,384 GPUs: one every 3.1 hours."""
    assert pytest.approx(3.09, abs=0.01) == FAILURE_HOURS / 16_384


@given(st.floats(0.1, 1e4), st.floats(1e4, 1e8), st.floats(0.2, 5))
def test_no_other_interval_loses_less(save_s, failure_s, other):
    best = save_interval_s(save_s, failure_s)
    assert lost_share(save_s, best, failure_s) <= lost_share(save_s, best * other, failure_s) * (
        1 + 1e-9
    )


def test_memory_is_what_drivers_say():
    """A maker's 141 GB are 2^30 bytes each, less what the device keeps for itself."""
    assert 139 * 2**30 < find_accelerator("h200").memory_bytes < 142 * 2**30
    assert all(60 * 2**30 < row.memory_bytes < 300 * 2**30 for row in ACCELERATORS)
