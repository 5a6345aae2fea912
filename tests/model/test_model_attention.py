"""Bias channels, kernels and attention against float64, values and gradients.

The reference says what is meant: a score loses slope * distance, and nothing is read from another
document or from the future.
"""

import pytest
import torch

from summerlm.model.attention import Attention
from summerlm.model.bias import alibi_slopes, key_channels, query_channels
from summerlm.model.config import ModelConfig
from summerlm.model.kernels import Channelled, Masked, Memory, bias_matrix
from summerlm.model.rotary import rotary_table


def biases(heads, documents, alibi):
    """(B, H, T, T), float64: -slope * distance, and -inf where nothing may be read."""
    T = documents.shape[1]
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]).double()
    bias = -slopes[:, None, None] * distance * alibi
    readable = (distance >= 0) & (documents[:, :, None] == documents[:, None, :])  # (B, T, T)
    return torch.where(readable[:, None], bias, -torch.inf)


def reference(q, k, v, documents, alibi):
    """Attention in float64; q (B, H, T, C), k and v (B, K, T, C)."""
    H, C = q.shape[1], q.shape[3]
    k, v = (t.double().repeat_interleave(H // k.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / C**0.5 + biases(H, documents, alibi)
    return scores.softmax(-1) @ v


def by_kernel(kernel, q, k, v, documents, alibi, dropout=0.0):
    """The same by a kernel; q (B, H, T, C), k and v (B, K, T, C)."""
    frame = frame_of(kernel, documents, q.shape[1], q.shape[3], alibi, q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return frame.attend(q, k, v, Memory(), dropout).transpose(1, 2)


def frame_of(kernel, documents, heads, C, alibi, dtype=torch.float32, rope_base=1e4):
    T = documents.shape[1]
    tables = rotary_table(T, C, rope_base, torch.device("cpu"))
    if kernel == "plain":
        return Masked(*tables, bias_matrix(documents, heads, alibi, dtype))
    query = query_channels(heads, C**-0.5, alibi)
    return Channelled(*tables, query, key_channels(torch.arange(T), documents), kernel)


def documents_of(B, T, length):
    """Documents of `length` tokens, each row cut elsewhere; one document if None."""
    if length is None:
        return torch.zeros(B, T, dtype=torch.int64)
    return (torch.arange(T) + torch.arange(B)[:, None]) // length


def random_qkv(B, H, K, T, C, dtype=torch.float32, spread=1.0):
    torch.manual_seed(T * 31 + C)
    q, k, v = (torch.randn(B, h, T, C) for h in (H, K, K))
    return [t.to(dtype).requires_grad_() for t in (q * spread, k, v)]


def tolerance(kernel, dtype, documents):
    """What the kernel itself loses, and what scores lose to 256 nats a document before them."""
    if kernel == "plain":  # its scores are rounded to bf16; its biases are a matrix
        return 1e-4 if dtype == torch.float32 else 3e-2
    base = 1e-4 if dtype == torch.float32 else 1e-2
    return base + 5e-5 * documents.max().item()


def compare(kernel, inputs, documents, alibi, tol=None):
    got, want = by_kernel(kernel, *inputs, documents, alibi), reference(*inputs, documents, alibi)
    upstream = torch.randn_like(want)
    tol = tol or tolerance(kernel, got.dtype, documents)
    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol)
    got_gradients = torch.autograd.grad(got, inputs, upstream.to(got.dtype))
    want_gradients = torch.autograd.grad(want, inputs, upstream)
    for g, w in zip(got_gradients, want_gradients, strict=True):
        assert (g.double() - w.double()).norm() < tol * (w.double().norm() + 1)


KERNELS = ["sdpa", "flash", "plain"]  # those of CPUs
SHAPES = [(4, 4, 1, 8), (4, 2, 7, 10), (6, 3, 65, 17), (3, 1, 257, 33), (5, 5, 300, 24)]


@pytest.mark.parametrize(("H", "K", "T", "C"), SHAPES)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("length", [None, 1, 13, 100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_float32(kernel, H, K, T, C, alibi, length):
    inputs = random_qkv(2, H, K, T, C)
    compare(kernel, inputs, documents_of(2, T, length), alibi)


@pytest.mark.parametrize(("H", "K", "T", "C"), SHAPES)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("length", [None, 1, 13, 100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16(kernel, H, K, T, C, alibi, length):
    inputs = random_qkv(2, H, K, T, C, torch.bfloat16)
    compare(kernel, inputs, documents_of(2, T, length), alibi)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [300, pytest.param(1300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_more_documents_than_bfloat16_counts(kernel, dtype, count):
    """Counted in one bf16 channel, documents past 256 would run together."""
    inputs = random_qkv(1, 2, 1, 2 * count, 24, dtype)
    compare(kernel, inputs, documents_of(1, 2 * count, 2), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_that_spread_by_16(kernel, dtype):
    """A strongly wanted key of another document stays unread; bf16 holds scores of 64 to 1/4."""
    inputs = random_qkv(2, 4, 2, 300, 32, dtype, spread=16.0)
    tol = 0.3 if kernel == "plain" and dtype == torch.bfloat16 else None
    compare(kernel, inputs, documents_of(2, 300, 40), True, tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1000, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_far_positions(kernel, dtype, T):
    """Late positions times the steepest slope are the largest numbers that ALiBi adds."""
    compare(kernel, random_qkv(1, 2, 1, T, 16, dtype), documents_of(1, T, None), True)


@pytest.mark.parametrize("kernel", ["sdpa", "plain"])
def test_dropout_takes_the_same_biases(kernel):
    """The kernel that CPUs fall to with dropout knows documents and distances too."""
    inputs = random_qkv(1, 2, 2, 700, 16, torch.bfloat16)
    documents = documents_of(1, 700, 2)
    got = by_kernel(kernel, *inputs, documents, True, dropout=1e-9)
    tol = tolerance(kernel, got.dtype, documents)
    torch.testing.assert_close(
        got.double(), reference(*inputs, documents, True), rtol=tol, atol=tol
    )


def test_channels_are_exact_in_bfloat16():
    documents = torch.arange(0, 65536, 13)[None]
    tables = [query_channels(12, 96**-0.5, True), key_channels(documents[0], documents)]
    for table in tables:
        assert torch.equal(table.bfloat16().float(), table)


def test_channels_give_the_slope_to_float32():
    q = query_channels(32, 96**-0.5, True).double() * 96**-0.5
    positions = torch.tensor([0, 1, 255, 256, 4095, 65535])
    k = key_channels(positions, torch.zeros(1, 6).long())[0].double()
    expected = alibi_slopes(32)[:, None] * positions
    torch.testing.assert_close(q @ k.T, expected, rtol=1e-7, atol=0)


def test_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    expected = [2.0 ** (-i / 4) for i in range(1, 33)]
    torch.testing.assert_close(alibi_slopes(32), torch.tensor(expected).double())


def module_reference(attention, x, documents):
    """The whole of `Attention` in float64, rotation by complex numbers."""
    config, C = attention.config, attention.config.head_dim
    weights = {name: p.double() for name, p in attention.named_parameters()}
    rows = [h * C for h in (config.heads, config.kv_heads, config.kv_heads)]
    q, k, v = (
        (x.double() @ w.T).unflatten(-1, (-1, C)).transpose(1, 2)
        for w in weights["qkv.weight"].split(rows)
    )
    if config.qk_norm:
        q, k = (
            t / (t.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]
            for t, name in ((q, "query_norm.weight"), (k, "key_norm.weight"))
        )
    if config.rope:
        pair = torch.arange(C // 2).double()
        angles = torch.outer(torch.arange(x.shape[1]).double(), config.rope_base ** (-2 * pair / C))
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k))
        q, k = (torch.cat((t.real, t.imag), -1) for t in (q, k))
    y = reference(q, k, v, documents, config.alibi)
    return y.transpose(1, 2).flatten(2) @ weights["output.weight"].T


def make_attention(**changes):
    values = {"width": 48, "heads": 6, "kv_heads": 2, "head_dim": 10, "context": 80}
    config = ModelConfig(vocabulary=9, layers=1, mlp_hidden=8, **{**values, **changes})
    torch.manual_seed(0)
    attention = Attention(config)
    attention.config = config
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def frame_for(kernel, config, documents, dtype=torch.float32):
    return frame_of(
        kernel,
        documents,
        config.heads,
        config.head_dim,
        config.alibi,
        dtype,
        config.rope_base,
    )


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kernel", ["sdpa", "plain"])
def test_module(kernel, qk_norm, rope, alibi, kv_heads, how):
    head_dim = 10 if rope else 11
    attention = make_attention(
        qk_norm=qk_norm, rope=rope, alibi=alibi, kv_heads=kv_heads, head_dim=head_dim
    )
    x = torch.randn(2, 77, 48)
    if how == "bfloat16":
        attention, x = attention.bfloat16(), x.bfloat16()
    x.requires_grad_()
    documents = documents_of(2, 77, 30)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        dtype = torch.float32 if how == "float32" else torch.bfloat16
        got = attention(x, frame_for(kernel, attention.config, documents, dtype), Memory())
    want = module_reference(attention, x, documents)
    upstream = torch.randn_like(want)
    inputs = (x, *attention.parameters())
    got_gradients = torch.autograd.grad(got, inputs, upstream.to(got.dtype))
    want_gradients = torch.autograd.grad(want, inputs, upstream)
    # without the norm these scores spread by 5: bf16 queries and keys then err by percents
    tol = 3e-4 if how == "float32" else 0.06 if qk_norm else 0.15
    pairs = [(got, want), *zip(got_gradients, want_gradients, strict=True)]
    for g, w in pairs:
        assert (g.double() - w).norm() / w.norm() < tol


def test_channels_follow_the_query_dtype(monkeypatch):
    """Under autocast a float32 channel would turn queries and keys into float32 copies."""
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *arguments, **options):
        seen.extend((q.dtype, k.dtype, v.dtype))
        return kernel(q, k, v, *arguments, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    attention = make_attention(alibi=True)
    frame = frame_for("sdpa", attention.config, documents_of(1, 8, 3))
    with torch.autocast("cpu", torch.bfloat16):
        attention(torch.randn(1, 8, 48), frame, Memory())
    assert seen == [torch.bfloat16] * 3


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_cpu_takes_the_flash_kernel(kernel, kv_heads):
    """Without dropout nothing falls back to the kernel that makes the whole matrix."""
    attention = make_attention(alibi=True, kv_heads=kv_heads)
    x, documents = torch.randn(1, 64, 48), documents_of(1, 64, 10)
    with torch.profiler.profile() as profile:
        attention(x, frame_for(kernel, attention.config, documents), Memory()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


def test_a_kernel_that_torch_lacks_is_no_silent_other_one():
    """Flash attention on CPUs takes no dropout: asked for by name it refuses."""
    q, k, v = random_qkv(1, 2, 2, 16, 8)
    with pytest.raises(RuntimeError, match=r"[Nn]o viable backend|No available kernel"):
        by_kernel("flash", q, k, v, documents_of(1, 16, None), False, dropout=0.5)


def test_plain_dropout_drops_and_differentiates_what_it_dropped():
    """With one key to read the average is the value, or nothing; its gradient likewise."""
    torch.manual_seed(0)
    q, k, v = random_qkv(3, 4, 2, 90, 8)
    documents = torch.arange(90).expand(3, 90)  # each token its own document
    y = by_kernel("plain", q, k, v, documents, False, dropout=0.25)
    factor = (y / v.repeat_interleave(2, 1)).detach()
    kept = factor > 0.5
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(factor, kept / 0.75 * torch.ones_like(factor), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), v)
    torch.testing.assert_close(gradient, factor.view(3, 2, 2, 90, 8).sum(2))


def test_plain_dropout_has_the_gradient_of_what_it_computed():
    """Against autograd through the same masks."""
    q, k, v = (t.detach().double().requires_grad_() for t in random_qkv(1, 4, 2, 130, 8))
    documents = documents_of(1, 130, 50)

    def function(*inputs):
        torch.manual_seed(3)
        return by_kernel("plain", *inputs, documents, True, dropout=0.3)

    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_is_what_it_is_eager(kernel):
    attention = make_attention(alibi=True)
    x, documents = torch.randn(2, 80, 48, requires_grad=True), documents_of(2, 80, 30)
    frame = frame_for(kernel, attention.config, documents)
    results = []
    for function in (attention, torch.compile(attention)):
        y = function(x, frame, Memory())
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *attention.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_plain_is_an_operation_as_torch_wants_it(B, dropout):
    """Shapes, strides and gradients as it says of itself, also of inputs that aren't contiguous."""
    q, k, v = (t.detach().requires_grad_() for t in random_qkv(B, 4, 2, 130, 8))
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    bias = bias_matrix(documents_of(B, 130, 50), 4, True, torch.float32)
    torch.library.opcheck(
        torch.ops.summerlm.plain_attention.default,
        (q, k, v, bias, dropout),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
