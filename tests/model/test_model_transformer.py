"""The whole model: what reads what, what each setting does, how it is built and compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build

from summerlm.core.config import validate
from summerlm.core.errors import UsageError
from summerlm.model.config import ModelConfig
from summerlm.model.init import Law, fill, laws
from summerlm.model.transformer import Positions, Transformer
from summerlm.parallel.sharding import parts_of


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


BASE = {
    "vocabulary": 150,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "mlp_hidden": 40,
    "context": 64,
    "init_std": 0.2,
    "zero_init_outputs": False,
}

CHANGES = {  # a value for every field that must change what the model does
    "vocabulary": 140,
    "width": 36,
    "layers": 3,
    "heads": 2,
    "kv_heads": 4,
    "head_dim": 10,
    "mlp_hidden": 41,
    "mlp_bias": True,
    "norm_eps": 0.1,
    "rope": False,
    "rope_base": 100.0,
    "alibi": True,
    "qk_norm": False,
    "layer_scale": 0.1,
    "dropout": 0.2,
    "tied_embeddings": True,
    "logit_soft_cap": 2.0,
    "context": 20,
    "init_std": 0.1,
    "zero_init_outputs": True,
}


def make(**changes):
    return build(ModelConfig(**BASE | changes), seed=0)


def observe(config):
    """Logits of a fixed row in training mode, or the error that it meets."""
    model = build(config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.1)  # a bias begins at zero, where it does nothing yet
    torch.manual_seed(0)
    tokens = torch.arange(30)[None]
    try:
        return model.logits(model(tokens))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("field", ModelConfig.model_fields)
def test_every_setting_acts(field):
    before, after = (observe(ModelConfig(**BASE | c)) for c in ({}, {field: CHANGES[field]}))
    if field == "context":
        assert after == "a row of 30 tokens is longer than the context (20)"
    elif field == "vocabulary":
        assert (before.shape[-1], after.shape[-1]) == (150, 140)
    else:
        assert (before - after).abs().max() > 1e-4


VARIANTS = [
    {},
    {"alibi": True},
    {"alibi": True, "rope": False, "qk_norm": False},
    {"layer_scale": 0.5, "mlp_bias": True, "kv_heads": 4, "alibi": True},
    {"kv_heads": 1, "tied_embeddings": True, "logit_soft_cap": 3.0},
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_token_is_read_only_later_in_its_document(variant, data):
    """To the bit: what a token changes begins at it and ends with its document."""
    model = make(**VARIANTS[variant]).eval()
    T = data.draw(st.integers(1, 64))
    cuts = data.draw(st.sets(st.integers(1, 63)))
    where = data.draw(st.integers(0, T - 1))
    documents = torch.tensor([[sum(cut <= t for cut in cuts) for t in range(T)]] * 2)
    tokens = torch.randint(150, (2, T), generator=torch.Generator().manual_seed(T))
    changed = tokens.clone()
    changed[0, where] = (changed[0, where] + 1) % 150
    with torch.autocast("cpu", torch.bfloat16, enabled=data.draw(st.booleans())):
        before, after = (model.logits(model(t, documents)) for t in (tokens, changed))
    differs = (before != after).any(-1)  # (B, T)
    assert not differs[1].any()
    assert differs[0, where]
    reach = (torch.arange(T) >= where) & (documents[0] == documents[0, where])
    assert not (differs[0] & ~reach).any()


@pytest.mark.parametrize("alibi", [False, True])
def test_packed_documents_are_what_they_are_alone(alibi):
    """Positions run along the row, and yet only distances inside a document count."""
    model = make(alibi=alibi).eval()
    lengths = [5, 1, 17, 30]
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]
    tokens = torch.randint(150, (1, sum(lengths)))
    packed = model(tokens, documents).split(lengths, dim=1)
    for alone, together in zip(tokens.split(lengths, dim=1), packed, strict=True):
        torch.testing.assert_close(model(alone), together, rtol=1e-3, atol=2e-4)


def test_rotary_positions_run_along_the_row():
    positions = Positions(ModelConfig(**BASE))
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]])
    frame = positions(tokens, documents, 3)
    assert torch.equal(frame.cos, positions.cos[3:12])
    assert frame.key_channels[0, :, 1].tolist() == list(range(3, 12))
    assert frame.key_channels[0, :, 7].tolist() == documents[0].tolist()


def test_evaluation_is_deterministic_and_training_is_not():
    model = make(dropout=0.1)
    tokens = torch.randint(150, (2, 40))
    first, second = model(tokens), model(tokens)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("part", ["embedding", "attention", "mlp"])
def test_dropout_acts_in_three_places(part):
    model = make(dropout=0.5).eval()
    tokens = torch.randint(150, (1, 30))
    expected = model(tokens)
    blocks = list(model.blocks)
    {
        "embedding": [model.dropout],
        "attention": [block.attention for block in blocks],
        "mlp": [block.mlp.dropout for block in blocks],
    }[part][0].train()
    assert not torch.equal(model(tokens), expected)


def test_logits_and_head():
    model = make(logit_soft_cap=2.0).eval()
    hidden = 10 * torch.randn(3, 5, 32)
    raw = hidden @ model.head.weight[:150].T
    torch.testing.assert_close(model.logits(hidden), 2 * torch.tanh(raw / 2))
    tied = make(tied_embeddings=True)
    assert tied.head_weight is tied.embedding.weight
    assert not hasattr(tied, "head")
    assert model.logits(hidden.bfloat16().float()).dtype == torch.float32


def test_every_parameter_has_a_gradient():
    model = make(mlp_bias=True, layer_scale=0.1, alibi=True)
    model.logits(model(torch.randint(150, (2, 40)))).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_matrix_blocks_name_all_hidden_matrices():
    model = make(mlp_bias=True, layer_scale=0.1)
    blocks = model.matrix_blocks()
    shapes = {n: p.shape for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n}
    assert set(blocks) == set(shapes)
    assert all(sum(rows) == shapes[name][0] for name, rows in blocks.items())
    assert blocks["blocks.1.attention.qkv.weight"] == (32, 16, 16)
    assert blocks["blocks.0.mlp.gate_up.weight"] == (40, 40)


def test_parameter_names_are_those_that_checkpoints_hold():
    names = {n for n, _ in make(layers=1, mlp_bias=True, layer_scale=0.1).named_parameters()}
    assert names == {
        "embedding.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.query_norm.weight",
        "blocks.0.attention.key_norm.weight",
        "blocks.0.attention.output.weight",
        "blocks.0.attention_scale.weight",
        "blocks.0.mlp_norm.weight",
        "blocks.0.mlp.gate_up.weight",
        "blocks.0.mlp.gate_up.bias",
        "blocks.0.mlp.down.weight",
        "blocks.0.mlp.down.bias",
        "blocks.0.mlp_scale.weight",
        "final_norm.weight",
        "head.weight",
    }
    assert set(make().state_dict()) == {n for n, _ in make().named_parameters()}  # no tables


# --- building


def test_initialisation_follows_the_laws():
    model = make(width=256, mlp_hidden=300, layers=3, mlp_bias=True, layer_scale=0.01)
    outputs = 0.2 / 6**0.5
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("scale.weight"):
            assert (parameter == 0.01).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            std = outputs if "output" in name or "down" in name else 0.2
            assert abs(parameter.std().item() / std - 1) < 0.05, name
            assert abs(parameter.mean().item()) < 4 * std / parameter.numel() ** 0.5, name
    zeroed = make(zero_init_outputs=True)
    assert not zeroed.blocks[1].mlp.down.weight.any()
    assert not zeroed.blocks[1].attention.output.weight.any()
    assert torch.equal(zeroed(torch.arange(9)[None])[0, 3], zeroed(torch.tensor([[3]]))[0, 0])


def test_initialisation_depends_on_seed_and_name_alone():
    first, again, other = (build(ModelConfig(**BASE), seed=seed).state_dict() for seed in (7, 7, 8))
    deeper = build(ModelConfig(**BASE | {"layers": 4}), seed=7).state_dict()
    name = "blocks.1.attention.qkv.weight"
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first[name], deeper[name])
    assert not torch.equal(first[name], first["blocks.0.attention.qkv.weight"])


def test_a_parameter_without_a_law_is_refused():
    model = make()
    model.blocks[0].register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(KeyError, match=r"blocks\.0\.gain has no law"):
        fill(parts_of(model, 0, 1), model.config, 0)


def test_every_law_is_for_a_parameter():
    config = ModelConfig(**BASE | {"mlp_bias": True, "layer_scale": 0.1})
    assert len(laws(config)) == 9
    assert laws(config)["blocks.*_scale.weight"] == Law(0.1, 0.0)


@pytest.mark.parametrize("move", ["build", "bfloat16", "double"])
def test_tables_stay_true(move):
    """Built without memory or cast, rotary tables are what they were, in float32."""
    expected = Positions(ModelConfig(**BASE | {"alibi": True}))
    model = make(alibi=True)
    if move != "build":
        model = getattr(model, move)()
        assert model.embedding.weight.dtype == getattr(torch, move.replace("double", "float64"))
    for name, table in expected.named_buffers():
        assert torch.equal(model.positions.get_buffer(name), table)
        assert table.dtype == torch.float32


def test_bfloat16_model_runs_near_float32():
    model = make(alibi=True).eval()
    tokens = torch.randint(150, (2, 60))
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens)
    assert mixed.dtype == torch.float32  # the residual stream's
    low = model.bfloat16()(tokens)
    assert low.dtype == torch.bfloat16
    for hidden in (mixed, low):
        assert (hidden.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.slow
def test_blocks_compile_whole_and_once():
    """No graph break, one graph for all blocks, the same values and gradients."""
    from torch._dynamo.utils import counters  # here: it takes a second to import

    torch._dynamo.reset()
    counters.clear()
    tokens = torch.randint(150, (2, 60))
    documents = (torch.arange(60) // 13).expand(2, -1)
    models = [make(alibi=True, layer_scale=0.1) for _ in range(2)]
    for block in models[1].blocks:
        block.compile(fullgraph=True)
    weights = torch.randn(2, 60, 32)
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            results = [model(tokens, documents) for model in models]
        for model, result in zip(models, results, strict=True):
            model.zero_grad()
            (result * weights).sum().backward()
        tol = 1e-4 if dtype is None else 0.03
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            if a.grad is not None:
                assert (a.grad - b.grad).norm() <= tol * a.grad.norm(), name
    assert counters["stats"]["unique_graphs"] == 2  # one a precision, whatever the depth

    for model in models:
        model.eval()
    for rows, T in ((3, 60), (2, 33), (5, 17), (1, 64)):  # shapes that evaluation meets
        tokens = torch.randint(150, (rows, T))
        with torch.no_grad():
            eager, compiled = (model(tokens) for model in models)
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    # rows become free once, and one row; plain attention is another graph for each length
    assert counters["stats"]["unique_graphs"] <= 6


# --- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, r"kv_heads \(3\) must divide heads \(4\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"layers": 0}, "layers = 0: should be greater than 0"),
        ({"layers": True}, "layers = True: should be a valid integer"),
        ({"dropout": 1.0}, "dropout = 1.0: should be less than 1"),
        ({"context": 65537}, "context = 65537"),
        ({"norm_eps": 0}, "norm_eps = 0"),
        ({"widht": 3}, "no setting widht; did you mean width"),
    ],
)
def test_settings_that_mean_nothing(change, message):
    with pytest.raises(UsageError, match=message):
        validate(ModelConfig, BASE | change, "test")


def test_odd_heads_without_rope():
    assert make(head_dim=7, rope=False)(torch.arange(9)[None]).shape == (1, 9, 32)


@pytest.mark.parametrize(("vocabulary", "rows"), [(1, 128), (128, 128), (129, 256), (32773, 32896)])
def test_padded_vocabulary(vocabulary, rows):
    assert ModelConfig(**BASE | {"vocabulary": vocabulary}).padded_vocabulary == rows


def test_summer_4b_has_its_published_size():
    """The original's count, before padding: 32 blocks, a norm, embedding and head."""
    config = ModelConfig(
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
    with torch.device("meta"):
        model = Transformer(config)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    padding = 2 * (32_896 - 32_773) * 3072
    assert block == 136_876_032
    assert sum(p.numel() for p in model.parameters()) - padding == 4_581_393_408
