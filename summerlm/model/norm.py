"""Root-mean-square normalisation, and the learned factor on a branch.

Flow: used by `attention` (queries and keys) and `transformer` (before each branch, at the end).

Shapes: D channels, whatever stands before them.
"""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Bring the last dimension to a mean square of one, then scale each channel.

    The root stands over mean square + eps, so that a row of zeros has a gradient.

    Args:
        channels: Size of the last dimension.
        eps: Added to the mean square.

    Source:
        Zhang & Sennrich 2019, arXiv:1910.07467.

    Example:
        >>> RMSNorm(2, eps=1e-12)(torch.tensor([[1.0, 7.0]])) * 5  # root of mean square: 5
        tensor([[1., 7.]], grad_fn=<MulBackward0>)
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: Any shape that ends in `channels`, any float dtype.

        Returns:
            Same shape and dtype as `x`; the statistics are float32.
        """
        y: Tensor = _Normalise.apply(x, self.weight, self.eps)
        return y


class _Normalise(torch.autograd.Function):
    """x / root(mean square + eps) * weight, with its gradient by hand.

    On CPUs, where each operation goes through memory, this takes half the time of autograd's and
    of torch's own `rms_norm` (LOG.md); compiled code fuses it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.float()
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        inverse = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (y * inverse).mul_(weight).type_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        y, g = x.float() * inverse, gradients[0].float()  # y: normalised
        to_weight = (g * y).reshape(-1, y.shape[-1]).sum(0)
        g = g * weight
        along = (g * y).mean(-1, keepdim=True)  # what would only lengthen the row
        to_x = g.sub_(y.mul_(along)).mul_(inverse)
        return to_x.type_as(x), to_weight.type_as(weight), None


class LayerScale(nn.Module):
    """Scale what a branch adds to the residual stream, each channel by a learned factor.

    Args:
        channels: Model width D.
        value: First value of every factor.

    Source:
        Touvron et al. 2021, arXiv:2103.17239, section 3.
    """

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Scale an update of the residual stream, (B, T, D); the result has its dtype."""
        return (x * self.weight).type_as(x)
