"""The compute-optimal rule: what it gives back, keeps and refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan_count import SMALL, SUMMER_4B

from summerlm.model.config import ModelConfig
from summerlm.plan.count import flops_per_token, parameters
from summerlm.plan.scaling import fit


def test_the_budget_of_a_model_gives_that_model():
    tokens = 20 * parameters(SUMMER_4B)
    found = fit(SUMMER_4B, tokens * flops_per_token(SUMMER_4B))
    assert found.model == SUMMER_4B
    assert found.tokens == tokens


@settings(max_examples=15, deadline=None)
@given(st.floats(18, 23))
def test_proportions_and_budget_are_kept(power):
    flops = 10**power
    found = fit(SUMMER_4B, flops)
    model = found.model
    assert found.tokens * flops_per_token(model) == pytest.approx(flops, rel=1e-6)
    assert found.tokens / parameters(model) == pytest.approx(found.ratio)
    assert found.ratio == pytest.approx(20, rel=0.25)
    assert model.width % 128 == 0
    assert model.head_dim == SUMMER_4B.head_dim
    assert model.heads % model.kv_heads == 0
    assert model.layers / model.width == pytest.approx(32 / 3072, rel=0.4)


def test_more_compute_makes_more_of_both():
    found = [fit(SUMMER_4B, 10.0**power) for power in range(19, 25)]
    assert [f.tokens for f in found] == sorted(f.tokens for f in found)
    sizes = [parameters(f.model) for f in found]
    assert sizes == sorted(sizes)


def test_too_small_a_budget():
    with pytest.raises(ValueError, match="too small a budget"):
        fit(ModelConfig(**SMALL | {"width": 128}), 1e12)
