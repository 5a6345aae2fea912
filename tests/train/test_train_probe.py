"""The largest attention logit, against scores of the whole matrix in float64."""

import pytest
import torch
from models import build
from ranks import run_ranks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import summerlm.train.probe as probe
from summerlm.model.config import ModelConfig
from summerlm.train.probe import attention_logit_max

MODEL = ModelConfig(
    vocabulary=50,
    width=24,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_hidden=32,
    context=40,
    zero_init_outputs=False,
)


def make(seed=1, **changes):
    model = build(MODEL.model_copy(update=changes), seed=seed)
    for block in model.blocks:  # scores that differ between layers and heads
        with torch.no_grad():
            block.attention.qkv.weight.mul_(20)
    return model


def make_batch(T, B=2, seed=0, border=0.1):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (B, T), generator=draw)
    return tokens, (torch.rand(B, T, generator=draw) < border).long().cumsum(1)


def rotated(x, base):
    """Rotary positions as rotations of complex numbers; x (T, C) float64."""
    T, C = x.shape
    angles = torch.outer(
        torch.arange(T).double(), base ** (-torch.arange(0, C, 2).double() / C)
    )  # (T, C/2)
    turned = torch.complex(x[:, : C // 2], x[:, C // 2 :]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag), -1)


def reference(model, tokens, documents):
    """All scores of all layers, one query head after another, in float64."""
    model = model.double().eval()
    config, C, best = model.config, model.config.head_dim, []
    inputs = {}
    handles = [
        block.attention.register_forward_hook(
            lambda _m, args, _out, i=i: inputs.__setitem__(i, args[0].detach())
        )
        for i, block in enumerate(model.blocks)
    ]
    model(tokens, documents)
    for handle in handles:
        handle.remove()
    for i, block in enumerate(model.blocks):
        weight = block.attention.qkv.weight.detach()
        for x, document in zip(inputs[i], documents, strict=True):
            maps = (x @ weight.T).split(C, dim=1)  # H + 2K of (T, C)
            for head in range(config.heads):
                q = maps[head]
                k = maps[config.heads + head // (config.heads // config.kv_heads)]
                if config.qk_norm:
                    norms = block.attention.query_norm, block.attention.key_norm
                    q, k = (
                        t / (t.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * n.weight
                        for t, n in zip((q, k), norms, strict=True)
                    )
                if config.rope:
                    q, k = rotated(q, config.rope_base), rotated(k, config.rope_base)
                for t in range(len(x)):
                    best += [
                        (q[t] @ k[s] / C**0.5).item()
                        for s in range(t + 1)
                        if document[s] == document[t]
                    ]
    return max(best)


@pytest.mark.parametrize("queries", [1, 7, 1024])
@pytest.mark.parametrize(
    "changes",
    [{}, {"rope": False, "alibi": True}, {"qk_norm": False}, {"kv_heads": 4}, {"kv_heads": 1}],
    ids=str,
)
def test_equals_the_reference(changes, queries, monkeypatch):
    monkeypatch.setattr(probe, "QUERIES", queries)
    model = make(**changes)
    if model.config.qk_norm:
        with torch.no_grad():
            for i, block in enumerate(model.blocks):
                block.attention.query_norm.weight.mul_(torch.linspace(0.5, (3, 9, 1)[i], 6))
    tokens, documents = make_batch(19)
    found = attention_logit_max(model, tokens, documents)
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(reference(model, tokens, documents), rel=1e-4)


def test_only_what_a_query_may_read_counts():
    """The one large pair is outside in turn: of another document, or of a later key."""
    q, k = torch.full((1, 4, 1, 2), -1.0), torch.ones(1, 4, 1, 2)
    q[0, 2], k[0, 1] = 10.0, 10.0
    one, two = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 1, 1]])
    assert probe._largest(q, k, one) == 200
    assert probe._largest(q, k, two) == 20  # the query with the key of its own place
    q, k = q.flip(1), k.flip(1)  # now the key comes after the query
    assert probe._largest(q, k, one) == 20
    assert probe._largest(-q.abs(), k.abs(), one) == -2, "below zero too"


def test_the_model_is_left_as_it_was():
    model = make(dropout=0.4).train()
    tokens, documents = make_batch(11)
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    before = model(tokens, documents)
    random = torch.get_rng_state()
    first, second = (attention_logit_max(model, tokens, documents) for _ in range(2))
    assert first == second, "no dropout"
    assert torch.equal(torch.get_rng_state(), random), "nothing was drawn"
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(0)
    assert torch.equal(model(tokens, documents), before)


def test_hooks_go_when_the_pass_fails():
    model = make().train()
    tokens, documents = make_batch(11)
    with pytest.raises(ValueError, match="longer than the context"):
        attention_logit_max(model, tokens.repeat(1, 9), documents.repeat(1, 9))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_in_bfloat16_it_is_close():
    model = make()
    tokens, documents = make_batch(23)
    exact = attention_logit_max(model, tokens, documents)
    found = attention_logit_max(model, tokens, documents, torch.bfloat16)
    assert found.dtype == torch.float32
    assert found != exact
    assert found.item() == pytest.approx(exact.item(), rel=0.05)


def test_compiled_blocks_stay_compiled():
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model = make().train()
    tokens, documents = make_batch(13)
    expected = attention_logit_max(model, tokens, documents)
    for block in model.blocks:
        block.compile(backend=backend)
    model(tokens, documents).sum().backward()
    made = len(compiled)
    assert made
    for T in (13, 13, 5):
        batch = make_batch(T)
        found = attention_logit_max(model, *batch)
        assert T != 13 or found == expected
    model(tokens, documents).sum().backward()
    assert len(compiled) == made, "nothing is compiled for the probe or after it"


def probe_sharded(ranks, precision):
    model = make()
    tokens, documents = make_batch(17, B=1, seed=ranks.rank)
    alone = attention_logit_max(model, tokens, documents, precision).item()
    policy = MixedPrecisionPolicy(param_dtype=precision)
    for module in (*model.blocks, model):
        fully_shard(module, mp_policy=policy)
    train = torch.autocast("cpu", precision, enabled=precision is not None)
    with train:
        model(tokens, documents).sum().backward()
    sharded = attention_logit_max(model, tokens, documents, precision).item()
    with train:
        model(tokens, documents).sum().backward()
    return alone, sharded


@pytest.mark.ranks
@pytest.mark.parametrize(("precision", "close"), [(None, 1e-6), (torch.bfloat16, 0.02)])
def test_a_sharded_model_has_the_same_logits(precision, close):
    pairs = run_ranks(probe_sharded, precision)
    for alone, sharded in pairs:
        assert sharded == pytest.approx(alone, rel=close)
    assert pairs[0] != pairs[1], "each rank sees its own row"
