"""Parameters and FLOPs against the model itself and torch's own counter."""

import pytest
import torch
from models import build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from summerlm.model.bias import CHANNELS
from summerlm.model.config import ModelConfig
from summerlm.model.loss import next_token_loss
from summerlm.plan.count import flops_per_token, parameters

SUMMER_4B = ModelConfig(
    vocabulary=32_773,
    width=3072,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=96,
    mlp_hidden=10_752,
    mlp_bias=True,
    alibi=True,
    qk_norm=False,
    layer_scale=1e-2,
    dropout=0.1,
    context=4096,
)

SMALL = {
    "vocabulary": 256,
    "width": 48,
    "layers": 3,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 16,
    "mlp_hidden": 100,
    "context": 64,
}


def test_summer_4b():
    assert parameters(SUMMER_4B) == 4_581_393_408
    assert parameters(SUMMER_4B, padded=True) == 4_581_393_408 + 2 * 123 * 3072
    assert flops_per_token(SUMMER_4B) / 1e9 == pytest.approx(29.29, abs=0.005)
    at_2048 = SUMMER_4B.model_copy(update={"context": 2048})
    assert flops_per_token(at_2048) / 1e9 == pytest.approx(28.09, abs=0.005)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": True, "vocabulary": 200}, {"kv_heads": 1, "mlp_bias": True}],
)
def test_parameters_are_the_models(changes):
    config = ModelConfig(**SMALL | changes)
    model = build(config, seed=0)
    count = sum(p.numel() for p in model.parameters())
    tables = 1 if config.tied_embeddings else 2
    assert parameters(config, padded=True) == count
    assert parameters(config) == count - tables * 48 * (256 - config.vocabulary)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2, "heads": 6}, {"mlp_hidden": 33}])
def test_flops_against_torch(changes):
    """torch counts attention over all T keys and the channels of biases: both are taken off."""
    config = ModelConfig(**SMALL | changes)
    model = build(config, seed=0, attention="sdpa")
    B, T = 2, config.context
    tokens = torch.randint(config.vocabulary, (B, T))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = next_token_loss(
            model(tokens).flatten(0, 1),
            model.head_weight,
            tokens.flatten(),
            vocabulary=config.vocabulary,
        )
        loss.total.backward()
    E = config.head_dim + CHANNELS
    counted_attention = 3 * config.layers * 2 * 2 * config.heads * E * T
    attention = counted_attention * config.head_dim // E // 2
    assert counter.get_total_flops() / (B * T) - counted_attention + attention == pytest.approx(
        flops_per_token(config), rel=1e-12
    )
