"""Causal self-attention: the only place where one token reads another.

Flow: called by `transformer.Block`; takes rotary tables and the kernel with its biases from a
`Frame`, which all layers share, and what the layer remembers from a `Memory`.

Shapes: B rows, T positions, D width, H query heads, K key/value heads (K divides H), C channels a
head.
"""

from torch import Tensor, nn

from summerlm.model.config import ModelConfig
from summerlm.model.kernels import Frame, Memory
from summerlm.model.norm import RMSNorm
from summerlm.model.rotary import rotate, stay


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

    def forward(
        self, x: Tensor, frame: Frame, memory: Memory, asked: Tensor | None = None
    ) -> Tensor:
        """Attend over one batch of rows.

        Args:
            x: Normalised residual stream, (B, T, D).
            frame: Rotary tables, biases and kernel of these T positions.
            memory: Earlier positions of the same rows.
            asked: Which of the B * T positions are wanted, (N,), int64; None = all.

        Returns:
            The update to add to the residual stream, (B, T, D), or (N, D).
        """
        q, k, v = self.project(x, frame)
        y = frame.attend(q, k, v, memory, self.dropout if self.training else 0.0)  # (B, T, H, C)
        y = y.flatten(2)  # (B, T, H C)
        return self.output(y if asked is None else y.flatten(0, 1)[asked])

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
