"""RMSNorm against float64, and where the original's went wrong."""

import pytest
import torch

from summerlm.model.norm import LayerScale, RMSNorm


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4, 33)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_equals_float64(shape, eps):
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], eps)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, requires_grad=True)
    y = norm(x)
    upstream = torch.randn(shape)
    got = torch.autograd.grad(y, (x, norm.weight), upstream)

    x64, w64 = x.double(), norm.weight.double()
    want = x64 / (x64.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w64
    expected = torch.autograd.grad(want, (x, norm.weight), upstream.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


def test_zero_row_has_a_gradient():
    """With eps outside the root, as in the original, this gradient is NaN."""
    x = torch.zeros(2, 8, requires_grad=True)
    RMSNorm(8, 1e-8)(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_bfloat16_keeps_float32_statistics():
    torch.manual_seed(0)
    x = torch.randn(50, 333).bfloat16()
    y = RMSNorm(333, 1e-6)(x)
    assert y.dtype == torch.bfloat16
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    # nothing but the last rounding, half a unit in 8 bits
    torch.testing.assert_close(y.double(), expected, rtol=1.01 * 2**-8, atol=0)


def test_layer_scale_keeps_the_dtype():
    scale = LayerScale(4, 0.25)
    assert torch.equal(scale(torch.ones(2, 4)), torch.full((2, 4), 0.25))
    assert scale(torch.ones(2, 4).bfloat16()).dtype == torch.bfloat16
