"""Causal self-attention: the only place where one token reads another.

Flow: called by `transformer.Block`; takes rotary tables and bias channels from a `Frame`, which
all layers share, and what the layer remembers from a `Memory`.

Shapes: B rows, T positions, S positions read (T and those remembered), D width, H query heads,
K key/value heads (K divides H), C channels a head, E = C + 8 with the bias channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from summerlm.model.bias import CHANNELS
from summerlm.model.config import ModelConfig
from summerlm.model.norm import RMSNorm
from summerlm.model.rotary import rotate, stay


@dataclass(frozen=True)
class Frame:
    """What all layers of one pass share: where its T tokens stand and what separates them."""

    cos: Tensor  # (T, C/2), float32
    sin: Tensor  # (T, C/2), float32
    query_channels: Tensor  # (H, 8)
    key_channels: Tensor  # (B, T, 8)


class Memory:
    """What a layer remembers of earlier positions: nothing; `generate.cache` remembers all."""

    length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put what is remembered before new keys and values.

        Args:
            k: Keys with their channels, (B, K, T, E).
            v: Values, (B, K, T, E).

        Returns:
            All keys and values that the new positions may read, (B, K, S, E) each.
        """
        return k, v


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """Average the values that each query may read: the one place that picks a kernel.

    The queries are the last T of the S positions. With T = S (training, a whole prompt) and
    T = 1 (one more token) this is a fused kernel without a mask tensor; otherwise it has one.
    Dropout on a CPU makes the whole matrix: it is for GPUs and small tests.

    Args:
        q: Queries, (B, H, T, E).
        k: Keys, (B, K, S, E).
        v: Values, (B, K, S, E): the fused kernels want them as wide as keys.
        scale: Scores are multiplied with it.
        dropout: Share of the probabilities dropped.

    Returns:
        The averages, (B, H, T, E).
    """
    T, S = q.shape[2], k.shape[2]
    mask, causal = None, False
    if T == S:
        causal = True
    elif T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, scale=scale, enable_gqa=True
    )


def append(x: Tensor, channels: Tensor) -> Tensor:
    """Append bias channels, (..., 8) that broadcast, to x (B, T, heads, C) in its own dtype."""
    return torch.cat((x, channels.to(x.dtype).expand(*x.shape[:3], CHANNELS)), -1)


class Attention(nn.Module):
    """Let every position gather values from itself and the earlier ones of its document.

    H / K query heads share one key/value head.

    Args:
        config: The model's settings.

    Source:
        Ainslie et al. 2023, arXiv:2305.13245 (grouped queries);
        Henry et al. 2020, arXiv:2010.04245 (query/key norm).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.head_dim
        self.head_dim, self.dropout = C, config.dropout
        self.heads = (config.heads, config.kv_heads, config.kv_heads)
        self.qkv = nn.Linear(config.width, sum(self.heads) * C, bias=False)
        self.output = nn.Linear(config.heads * C, config.width, bias=False)
        self.query_norm = RMSNorm(C, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(C, config.norm_eps) if config.qk_norm else nn.Identity()
        self.rotate = rotate if config.rope else stay

    def forward(self, x: Tensor, frame: Frame, memory: Memory) -> Tensor:
        """Attend over one batch of rows.

        Args:
            x: Normalised residual stream, (B, T, D).
            frame: Rotary tables and bias channels of these T positions.
            memory: Earlier positions of the same rows.

        Returns:
            The update to add to the residual stream, (B, T, D).
        """
        q, k, v = self.project(x, frame)
        q = append(q, frame.query_channels)  # (B, T, H, E)
        k = append(k, frame.key_channels.unsqueeze(2))  # (B, T, K, E)
        v = F.pad(v, (0, CHANNELS))  # (B, T, K, E)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # heads first, as kernels want

        k, v = memory.extend(k, v)  # (B, K, S, E)
        y = attend(q, k, v, self.head_dim**-0.5, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2)[..., : self.head_dim]  # (B, T, H, C)
        return self.output(y.flatten(2))

    def project(self, x: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
        """Make what is compared and averaged, before any bias.

        Args:
            x: Normalised residual stream, (B, T, D).
            frame: Rotary tables of these T positions.

        Returns:
            Queries, (B, T, H, C), keys and values, (B, T, K, C) each.
        """
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2K, C)
        q, k, v = qkv.split(self.heads, dim=2)
        q = self.rotate(self.query_norm(q), frame.cos, frame.sin)  # (B, T, H, C)
        k = self.rotate(self.key_norm(k), frame.cos, frame.sin)  # (B, T, K, C)
        return q, k, v
