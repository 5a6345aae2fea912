"""ALiBi and document isolation as eight extra channels of queries and keys.

Under a causal softmax whatever all scores of a query share cancels. So ALiBi's -m (i - j) is the
key's own term m j, and a border between documents is the key's own term S d(j), where d counts
the documents along the row: a query reads no later key, thus no later document, and every earlier
document loses at least S. Both are products of a query's constant and a key's number, so they
fit into the dot product itself, and any fused causal kernel computes them without a mask.

bf16 holds integers up to 256 and 8 bits of anything else. So a key's j and d are given as
(div 256, mod 256), each exact, and a query's slope as the sum of three bf16 numbers, which is
float32's precision.

Flow: `transformer.Positions` makes both sides once a pass; `attention` appends them to all
layers' queries and keys. Values get zeros there where a kernel wants equal widths.

Shapes: B rows, T positions, H heads, C channels a head.

Source: Press et al. 2021, arXiv:2108.12409, section 3, for ALiBi.
"""

import torch
from torch import Tensor

CHANNELS = 8
RADIX = 256  # bf16 holds every integer up to here
MAX_CONTEXT = RADIX * RADIX
SEPARATION = 256.0  # nats an earlier document loses; 64 leaks when scores spread by 16


def alibi_slopes(heads: int) -> Tensor:
    """Give each head its slope, 2^(-8h/H) for h = 1..H.

    Args:
        heads: Query heads, H.

    Returns:
        The slopes in nats a position, (H,), float64.

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)


def query_channels(heads: int, scale: float, alibi: bool) -> Tensor:
    """Make the channels of every query: constants of its head.

    Args:
        heads: Query heads, H.
        scale: What the kernel multiplies scores with; undone here.
        alibi: Whether keys lose slope * distance; documents are always separated.

    Returns:
        The channels, (H, 8), float32 with values that bf16 holds exactly.
    """
    slope = alibi_slopes(heads) / scale * alibi
    columns = []
    for _ in range(3):
        part = slope.to(torch.bfloat16).double()
        columns += [RADIX * part, part]
        slope = slope - part
    # rounding the separation hurts nobody, as long as it is the same for all keys
    separation = torch.full_like(slope, SEPARATION / scale).to(torch.bfloat16).double()
    columns += [RADIX * separation, separation]
    return torch.stack(columns, -1).float()


def key_channels(positions: Tensor, documents: Tensor) -> Tensor:
    """Make the channels of every key: its position and its document.

    Args:
        positions: Place of each token along its row, (T,), int64, below 65,536.
        documents: Which document of the row each token belongs to, counted from 0 and never
            falling along the row, (B, T), int64, below 65,536; -1 for padding in front.

    Returns:
        The channels, (B, T, 8), float32 with values that bf16 holds exactly; the softmax of
        `query_channels` against them is the same for all queries of a document.

    Example:
        >>> key_channels(torch.tensor([0, 300]), torch.tensor([[0, 1]]))[0, 1].tolist()
        [1.0, 44.0, 1.0, 44.0, 1.0, 44.0, 0.0, 1.0]
    """
    position = positions.expand_as(documents)
    columns = 3 * [position // RADIX, position % RADIX] + [documents // RADIX, documents % RADIX]
    return torch.stack(columns, -1).float()
