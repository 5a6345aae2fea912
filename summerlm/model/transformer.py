"""The model: a pre-norm, decoder-only transformer.

Flow:
    1. `Positions` turns a batch's shape and documents into a `Frame`, shared by all layers: where
       its tokens stand, what separates them, and by which kernel they attend;
    2. `Block` after `Block` adds what attention and MLP find to the residual stream;
    3. the final norm gives hidden states, which `loss.next_token_loss` takes with `head_weight`,
       and `Transformer.logits` turns into logits where all of them are wanted.
Made by `parallel.layout.lay_out`.

Shapes: B rows, T positions, D width, H query heads, C channels a head, V vocabulary,
Vp vocabulary padded.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from summerlm.model.attention import Attention
from summerlm.model.bias import key_channels, query_channels
from summerlm.model.config import ModelConfig
from summerlm.model.kernels import (
    Branches,
    Channelled,
    Frame,
    Masked,
    Memory,
    bias_matrix,
    branching_bias_matrix,
)
from summerlm.model.mlp import MLP
from summerlm.model.norm import LayerScale, RMSNorm
from summerlm.model.rotary import rotary_table


class Positions(nn.Module):
    """Constant tables about positions; they hold no weights and are in no checkpoint.

    Args:
        config: The model's settings.
    """

    kernel = "sdpa"
    """Kernel of whole rows, one of `kernels.KERNELS`; rows that go on take torch's choice."""

    cos: Tensor
    sin: Tensor
    query_channels: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for name, table in self._tables(torch.get_default_device()).items():
            self.register_buffer(name, table, persistent=False)

    def forward(
        self, tokens: Tensor, documents: Tensor | None, start: int = 0, *, whole: bool = True
    ) -> Frame:
        """Frame a batch.

        Args:
            tokens: Ids, (B, T).
            documents: Document of each token, (B, T), or None where each row is one document.
            start: Position of the first token along its row.
            whole: Whether rows begin here and nothing follows that must remember them.

        Returns:
            What all layers share.

        Raises:
            ValueError: If the rows reach past the context.
        """
        config, T = self.config, tokens.shape[1]
        if start + T > config.context:
            raise ValueError(
                f"a row of {start + T} tokens is longer than the context ({config.context})"
            )
        here = slice(start, start + T)
        documents = torch.zeros_like(tokens) if documents is None else documents
        cos, sin = self.cos[here], self.sin[here]
        if whole and self.kernel == "plain":
            dtype = self._score_dtype(tokens.device.type)
            return Masked(cos, sin, bias_matrix(documents, config.heads, config.alibi, dtype))
        positions = torch.arange(start, start + T, device=tokens.device)
        keys = key_channels(positions, documents)
        return Channelled(cos, sin, self.query_channels, keys, self.kernel if whole else "sdpa")

    def branch(self, branches: Branches, before: int) -> Frame:
        """Frame a batch of rows that branch.

        Args:
            branches: Where tokens stand and who reads them, all below the context.
            before: Positions that are remembered and stand before all rows.

        Returns:
            What all layers share: for the plain kernel on CPUs, else for torch's choice.
        """
        config, here = self.config, branches.positions
        cos, sin = self.cos[here], self.sin[here]  # (B, T, C/2)
        if here.device.type == "cpu":
            dtype = self._score_dtype("cpu")
            args = (config.heads, config.alibi, dtype)
            return Masked(cos, sin, branching_bias_matrix(branches, before, *args))
        keys = key_channels(here, torch.zeros_like(here))
        readable = branches.readable(before)
        return Channelled(cos, sin, self.query_channels, keys, "sdpa", readable)

    def _score_dtype(self, kind: str) -> torch.dtype:
        """Give the dtype that products of matrices have on a kind of device."""
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.cos.dtype

    def _tables(self, device: torch.device) -> dict[str, Tensor]:
        config, C = self.config, self.config.head_dim
        cos, sin = rotary_table(config.context, C, config.rope_base, device)
        channels = query_channels(config.heads, C**-0.5, config.alibi)
        return {"cos": cos, "sin": sin, "query_channels": channels.to(device)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to a device, yet stay float32 and true, also after `to_empty`."""
        super()._apply(fn, recurse)
        for name, table in self._tables(self.cos.device).items():
            setattr(self, name, table)
        return self


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy of the residual stream it adds to.

    Args:
        config: The model's settings.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, eps, scale = config.width, config.norm_eps, config.layer_scale
        self.attention_norm = RMSNorm(D, eps)
        self.attention = Attention(config)
        self.attention_scale = LayerScale(D, scale) if scale is not None else nn.Identity()
        self.mlp_norm = RMSNorm(D, eps)
        self.mlp = MLP(D, config.mlp_hidden, config.mlp_bias, config.dropout)
        self.mlp_scale = LayerScale(D, scale) if scale is not None else nn.Identity()

    def forward(
        self, x: Tensor, frame: Frame, memory: Memory, asked: Tensor | None = None
    ) -> Tensor:
        """Carry the residual stream, (B, T, D), through one block, or what is `asked`, (N, D)."""
        update = self.attention(self.attention_norm(x), frame, memory, asked)
        x = (x if asked is None else x.flatten(0, 1)[asked]) + self.attention_scale(update)
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """Token ids to hidden states, and hidden states to logits.

    Args:
        config: The model's settings.

    Example:
        >>> config = ModelConfig(vocabulary=300, width=32, layers=2, heads=4, kv_heads=2,
        ...                      head_dim=8, mlp_hidden=64, context=16)
        >>> model = Transformer(config)
        >>> hidden = model(torch.zeros(3, 10, dtype=torch.int64))
        >>> hidden.shape, model.logits(hidden).shape
        (torch.Size([3, 10, 32]), torch.Size([3, 10, 300]))
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = Positions(config)
        self.embedding = nn.Embedding(config.padded_vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied_embeddings:
            self.head = nn.Linear(config.width, config.padded_vocabulary, bias=False)

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: Sequence[Memory] | None = None,
        branches: Branches | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Read rows of tokens.

        Args:
            tokens: Ids, (B, T), int64.
            documents: Which document of its row each token belongs to, counted from 0 along the
                row, (B, T), int64; None where each row is one document.
            cache: What each layer remembers of the tokens before these, and is to remember of
                these; None when the rows begin here and nothing follows.
            branches: Where tokens stand and who reads them in rows that branch, in place of
                `documents`; None where each token stands after the one before.
            asked: Which of the B * T positions are wanted, (N,), int64; None = all. The last block
                leaves out the others where it can.

        Returns:
            Hidden states after the final norm, (B, T, D), or (N, D) of what is asked.

        Raises:
            ValueError: If the rows reach past the context.
        """
        memories = cache or [Memory()] * len(self.blocks)
        before = memories[0].length
        if branches is None:
            frame = self.positions(tokens, documents, before, whole=cache is None)
        else:
            frame = self.positions.branch(branches, before)
        x = self.dropout(self.embedding(tokens))  # (B, T, D)
        *early, last = zip(self.blocks, memories, strict=True)
        for block, memory in early:
            x = block(x, frame, memory)
        block, memory = last
        x = block(x, frame, memory) if asked is None else block(x, frame, memory, asked)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token of the vocabulary.

        Args:
            hidden: Hidden states, (..., D).

        Returns:
            Logits, (..., V), float32, soft-capped if the settings say so.
        """
        logits = self.unembed(hidden).float()[..., : self.config.vocabulary]
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Multiply hidden states, (..., D), with the output embedding; gives (..., Vp)."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding, (Vp, D): the head's weight, or the embedding's when tied."""
        return self.embedding.weight if self.config.tied_embeddings else self.head.weight

    def matrix_blocks(self) -> dict[str, tuple[int, ...]]:
        """Name the hidden matrices, each with the row counts of the maps that it fuses."""
        c = self.config
        rows: dict[str, Any] = {
            "attention.qkv": tuple(n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)),
            "attention.output": (c.width,),
            "mlp.gate_up": (c.mlp_hidden, c.mlp_hidden),
            "mlp.down": (c.width,),
        }
        return {f"blocks.{i}.{n}.weight": r for i in range(c.layers) for n, r in rows.items()}
