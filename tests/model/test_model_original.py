"""Equality with the original SummerLM-4B's forward, from a description of its mathematics.

`Original` is written from first principles, one formula a line, in float64: separate query, key
and value matrices, eps outside the root, a mask for everything. Its weights go into ours and come
back. `as documented` has RoPE and ALiBi, `as run` RoPE alone (its ALiBi was never reached).
"""

import pytest
import torch
import torch.nn.functional as F
from models import build

from summerlm.model.config import ModelConfig

CONFIG = {
    "vocabulary": 90,
    "width": 24,
    "layers": 3,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 6,
    "mlp_hidden": 84,
    "mlp_bias": True,
    "qk_norm": False,
    "layer_scale": 1e-2,
    "dropout": 0.1,
    "context": 40,
    "norm_eps": 1e-12,  # the original's 1e-8 outside the root is next to nothing
    "init_std": 0.3,
    "zero_init_outputs": False,
}


def original_norm(x, scale):
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8) * scale


def original_rope(x):
    """Turn pairs (i, i + C/2) by position * 10000^(-2i/C); x (B, H, T, C)."""
    T, C = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, C, 2).double() / C)
    angles = torch.outer(torch.arange(T).double(), frequencies).repeat(1, 2)  # (T, C)
    turned = torch.cat((-x[..., C // 2 :], x[..., : C // 2]), -1)
    return x * angles.cos() + turned * angles.sin()


def original_attention(x, w, heads, alibi):
    B, T, D = x.shape
    q, k, v = (
        (x @ w[name].T).view(B, T, heads, D // heads).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    scores = original_rope(q) @ original_rope(k).transpose(-1, -2) / (D // heads) ** 0.5
    if alibi:
        slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1).double())
        distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]  # j - i
        scores = scores + slopes[:, None, None] * distance
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return y.transpose(1, 2).reshape(B, T, D) @ w["output"].T


def original_mlp(x, w):
    gate, up = (x @ w["gate_up"].T + w["gate_up_bias"]).chunk(2, -1)
    return (gate / (1 + (-gate).exp()) * up) @ w["down"].T + w["down_bias"]


def original_logits(tokens, weights, heads, alibi):
    """Evaluate the whole model without dropout; tokens (B, T)."""
    x = weights["embedding"][tokens]
    for w in weights["blocks"]:
        attended = original_attention(original_norm(x, w["norm1"]), w, heads, alibi)
        x = x + w["scale1"] * attended
        x = x + w["scale2"] * original_mlp(original_norm(x, w["norm2"]), w)
    return original_norm(x, weights["norm"]) @ weights["head"].T


NAMES = {  # the original's part: our parameter in a block
    "norm1": "attention_norm.weight",
    "output": "attention.output.weight",
    "scale1": "attention_scale.weight",
    "norm2": "mlp_norm.weight",
    "gate_up": "mlp.gate_up.weight",
    "gate_up_bias": "mlp.gate_up.bias",
    "down": "mlp.down.weight",
    "down_bias": "mlp.down.bias",
    "scale2": "mlp_scale.weight",
}


def to_original(state, config):
    """Map our parameters to the original's, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    blocks = []
    for i in range(config.layers):
        block = {part: state[f"blocks.{i}.{name}"] for part, name in NAMES.items()}
        qkv = state[f"blocks.{i}.attention.qkv.weight"].split(config.width)
        blocks.append(block | dict(zip(("query", "key", "value"), qkv, strict=True)))
    V = config.vocabulary
    return {
        "embedding": state["embedding.weight"][:V],
        "head": state["head.weight"][:V],
        "norm": state["final_norm.weight"],
        "blocks": blocks,
    }


def from_original(weights, config):
    """Map the original's parameters to ours."""
    padding = (0, 0, 0, config.padded_vocabulary - config.vocabulary)
    state = {
        "embedding.weight": F.pad(weights["embedding"], padding),
        "head.weight": F.pad(weights["head"], padding),
        "final_norm.weight": weights["norm"],
    }
    for i, block in enumerate(weights["blocks"]):
        state |= {f"blocks.{i}.{name}": block[part] for part, name in NAMES.items()}
        qkv = torch.cat([block[part] for part in ("query", "key", "value")])
        state[f"blocks.{i}.attention.qkv.weight"] = qkv
    return {name: tensor.float() for name, tensor in state.items()}


@pytest.mark.parametrize("alibi", [True, False], ids=["as documented", "as run"])
@pytest.mark.parametrize("T", [1, 2, 17, 40])
def test_equals_the_original(alibi, T):
    config = ModelConfig(**CONFIG, alibi=alibi)
    torch.manual_seed(T)
    model = build(config, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no part stays at one or zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    weights = to_original(model.state_dict(), config)
    tokens = torch.randint(config.vocabulary, (3, T))
    expected = original_logits(tokens, weights, config.heads, alibi)
    torch.testing.assert_close(model.logits(model(tokens)).double(), expected, rtol=1e-5, atol=2e-5)

    ours = build(config, seed=2).eval()
    ours.load_state_dict(from_original(weights, config))
    logits = ours.logits(ours(tokens))
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=2e-5)
    logits.square().mean().backward()
    wanted = {n: t.clone().requires_grad_() for n, t in weights["blocks"][1].items()}
    weights["blocks"][1] = wanted
    original_logits(tokens, weights, config.heads, alibi).square().mean().backward()
    for part, name in NAMES.items():
        got = ours.get_parameter(f"blocks.1.{name}").grad.double()
        torch.testing.assert_close(got, wanted[part].grad, rtol=1e-4, atol=1e-6)


def test_the_two_modes_differ():
    config = ModelConfig(**CONFIG, alibi=True)
    model = build(config, seed=1)
    weights = to_original(model.state_dict(), config)
    tokens = torch.randint(config.vocabulary, (2, 30))
    modes = [original_logits(tokens, weights, config.heads, alibi) for alibi in (True, False)]
    assert (modes[0] - modes[1]).abs().max() > 1e-3
