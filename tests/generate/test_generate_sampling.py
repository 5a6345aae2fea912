"""Sampling: which tokens can come, how often, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.errors import UsageError
from summerlm.generate.sampling import sample


def draw(logits, temperature=1.0, top_k=None, top_p=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)


def allowed(logits, temperature, top_k, top_p):
    """Probabilities token by token, in plain Python; no two scores are equal."""
    weights = {i: float(torch.exp(torch.tensor(x).double() / temperature)) for i, x in logits}
    order = sorted(weights, key=weights.get, reverse=True)[:top_k]
    total = sum(weights[i] for i in order)
    kept, reached = [], 0.0
    for token in order:
        if top_p is not None and kept and reached >= top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 99])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.9, 1.0])
def test_frequencies(temperature, top_k, top_p):
    torch.manual_seed(3)
    logits = torch.randn(12)
    expected = allowed(list(enumerate(logits.tolist())), temperature, top_k, top_p)
    n = 20_000
    tokens = draw(logits.expand(n, -1), temperature, top_k, top_p)
    counts = torch.bincount(tokens, minlength=12) / n
    assert set(counts.nonzero()[:, 0].tolist()) <= set(expected)
    for token, probability in expected.items():
        sigma = (probability * (1 - probability) / n) ** 0.5
        assert abs(counts[token].item() - probability) < 5 * sigma + 1e-6


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.floats(0, 100) | st.sampled_from([5e-324, 1e-45, 1e-38]),
    st.none() | st.integers(1, 50),
    st.none() | st.floats(1e-30, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_there_is_always_a_token(scores, temperature, top_k, top_p):
    token = draw(torch.tensor([scores]), temperature, top_k, top_p).item()
    assert 0 <= token < len(scores)
    if top_k == 1:
        assert scores[token] == max(scores)


def test_temperature_zero_is_greedy():
    logits = torch.randn(50, 30)
    assert torch.equal(draw(logits, 0, top_k=7, top_p=0.3), logits.argmax(-1))
    for tiny in (5e-324, 1e-40, 1e-37, 1e-30):
        assert torch.equal(draw(100 * logits, tiny), logits.argmax(-1))
    assert torch.equal(draw(logits, 1.0, top_p=1e-9), logits.argmax(-1))


def test_the_seed_decides():
    logits = torch.randn(200, 30)
    assert torch.equal(draw(logits, seed=1), draw(logits, seed=1))
    assert not torch.equal(draw(logits, seed=1), draw(logits, seed=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, r"top_p = 0\.0"),
        ({"top_p": 1.1}, r"top_p = 1\.1"),
        ({"top_p": float("nan")}, "top_p = nan"),
    ],
)
def test_values_that_mean_nothing(values, message):
    with pytest.raises(UsageError, match=message):
        draw(torch.zeros(1, 5), **values)
