"""Rotary position embedding: positions as angles of channel pairs.

Flow: `rotary_table` is made once by `transformer.Positions`; `attention` rotates its queries and
keys with it.

Shapes: B rows, T positions, H heads, C channels a head.
"""

import torch
from torch import Tensor


def rotary_table(
    positions: int, channels: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tabulate the angle of each channel pair at each position.

    Args:
        positions: How many positions, from 0.
        channels: Channels a head, C, even.
        base: Pair i turns by base^(-2i/C) radians a position.
        device: Where the tables live.

    Returns:
        Cosines and sines, each (positions, C/2), float32.

    Example:
        >>> cos, sin = rotary_table(3, 4, 100.0, torch.device("cpu"))
        >>> cos[0].tolist(), round(sin[2, 1].item(), 4)  # the second pair: 2 * 100^(-1/2) = 0.2
        ([1.0, 1.0], 0.1987)
    """
    # float64: a float32 angle of thousands of radians is wrong in its fourth decimal
    pair = torch.arange(channels // 2, device=device, dtype=torch.float64)
    position = torch.arange(positions, device=device, dtype=torch.float64)
    angles = torch.outer(position, base ** (-2 * pair / channels))
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each channel pair (i, i + C/2) by its position's angle.

    Args:
        x: Queries or keys, (B, T, H, C), any float dtype.
        cos: Cosines, (T, C/2), float32; row t belongs to position t of `x`; (B, T, C/2) where rows
            differ.
        sin: Sines, same shape and dtype as `cos`.

    Returns:
        The rotated tensor, same shape and dtype as `x`.

    Source:
        Su et al. 2021, arXiv:2104.09864, section 3.4.2, in the half-split pairing of Hugging
        Face's Llama weights (the paper pairs neighbours).
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # broadcast over heads: (T, 1, C/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)


def stay(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Take the place of `rotate` in a model without rotary positions."""
    return x
