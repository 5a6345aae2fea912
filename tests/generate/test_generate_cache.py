"""Decoding with a cache against the whole forward pass."""

import pytest
import torch
from models import build

from summerlm.generate.cache import Cache
from summerlm.model.config import ModelConfig


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


VARIANTS = {
    "rope": {},
    "alibi": {"alibi": True, "rope": False, "qk_norm": False},
    "both": {"alibi": True, "kv_heads": 4, "layer_scale": 0.3},
    "one key head": {"alibi": True, "kv_heads": 1, "head_dim": 6},
}


def make(**changes):
    values = {
        "vocabulary": 90,
        "width": 32,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "mlp_hidden": 40,
        "context": 300,
        "init_std": 0.2,
        "zero_init_outputs": False,
    }
    return build(ModelConfig(**values | changes), seed=0).eval()


@torch.no_grad()
def decode(model, tokens, sizes, capacity=300):
    """Read tokens in pieces of these sizes, each after the ones before."""
    cache = Cache(model.config.layers, capacity)
    return torch.cat([model(piece, cache=cache) for piece in tokens.split(sizes, dim=1)], 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "sizes", [[1] * 40, [17] + [1] * 23, [40], [256] + [1] * 20, [5, 9, 1, 25]]
)
def test_equals_the_whole_forward(variant, rows, sizes):
    model = make(**VARIANTS[variant])
    tokens = torch.randint(90, (rows, sum(sizes)))
    with torch.no_grad():
        expected = model.logits(model(tokens))
    got = model.logits(decode(model, tokens, sizes))
    # ALiBi's part of a score reaches 70 here, and float32 keeps 7 digits of the sum
    tol = 3e-5 if model.config.alibi else 1e-5
    assert (got - expected).norm(dim=-1).max() < tol * expected.norm(dim=-1).mean()


def test_bfloat16_autocast():
    model = make(alibi=True)
    tokens = torch.randint(90, (2, 60))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(tokens)
        got = decode(model, tokens, [30] + [1] * 30)
    assert (got - expected).norm() / expected.norm() < 0.02


def test_documents_hold_in_the_cache():
    """Keys keep the document they came with: unequal prompts can share a batch, padded in front."""
    model = make(alibi=True)
    prompt, more = torch.randint(90, (1, 9)), torch.randint(90, (1, 4))
    padding = torch.randint(90, (1, 6))
    cache = Cache(model.config.layers, 20)
    with torch.no_grad():
        documents = torch.tensor([[0] * 6 + [1] * 9])
        model(torch.cat((padding, prompt), 1), documents, cache)
        got = model(more, torch.ones_like(more), cache)
        expected = model(torch.cat((prompt, more), 1))[:, 9:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_full_cache_is_our_bug():
    model = make()
    with pytest.raises(AssertionError, match="the cache is full"):
        decode(model, torch.zeros(1, 11, dtype=torch.int64), [10, 1], capacity=10)


def test_past_the_context():
    model = make(context=10)
    with pytest.raises(ValueError, match=r"a row of 11 tokens is longer than the context \(10\)"):
        decode(model, torch.zeros(1, 11, dtype=torch.int64), [10, 1])
