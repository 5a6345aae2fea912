"""The gated MLP: each position on its own.

Flow: called by `transformer.Block`.

Shapes: B rows, T positions, D width, F hidden channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """SwiGLU: a silu-gated product, projected back; gate and up share one matmul.

    Args:
        width: Model width D.
        hidden: Hidden channels F.
        bias: Whether both linears add a bias.
        dropout: Share of the outputs dropped in training.

    Source:
        Shazeer 2020, arXiv:2002.05202, section 2.
    """

    def __init__(self, width: int, hidden: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the normalised residual stream, (B, T, D), into the update to add to it."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.dropout(self.down(F.silu(gate) * up))  # (B, T, D)
