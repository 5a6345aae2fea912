"""The shape that both sides of a comparison have, and this project's model of that shape.

Flow: `peers.py` makes a `Shape` of its arguments and gives it to each side; `our_model` sizes the
MLP of ours so that a block has as many parameters as the peer's.

Shapes: D width, F hidden channels of an MLP, V vocabulary, T context, H heads, C channels a head.
"""

from dataclasses import dataclass, replace
from typing import Any

from summerlm.model.config import ModelConfig

PEERS = ("nanogpt", "original", "llama")
FILES = {"nanogpt": "model.py", "original": "nmdl.py"}  # of a checkout, with the model
EXPANSION = 3.5  # the original's MLP, as it is published


@dataclass(frozen=True)
class Shape:
    """What both sides have in common.

    Attributes:
        layers: Blocks.
        width: Channels of the residual stream, D.
        heads: Query heads.
        kv_heads: Key/value heads; the original and nanoGPT have as many as `heads`.
        context: Tokens of a row, T.
        rows: Rows of a step.
        vocabulary: Ids, V; each side pads it as it does.
        hidden: Hidden channels of the peer's MLP, F; None = as the peer has it.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    context: int
    rows: int
    vocabulary: int
    hidden: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.context


def peer_hidden(peer: str, shape: Shape) -> int:
    """Give the hidden channels of a peer's MLP.

    Args:
        peer: One of `PEERS`.
        shape: Its shape.

    Returns:
        F: what the shape says; else nanoGPT's own factor, the original's as published, Llama's
        rule (8/3 of the width, rounded up to 256).
    """
    if shape.hidden is not None:
        return shape.hidden
    if peer == "nanogpt":
        return 4 * shape.width
    if peer == "original":
        return int(EXPANSION * shape.width)
    return -(-8 * shape.width // 3 // 256) * 256


def attention_matrices(shape: Shape, head_dim: int) -> int:
    """Count the parameters of a block's attention."""
    return shape.width * head_dim * 2 * (shape.heads + shape.kv_heads)


def block_matrices(peer: str, shape: Shape) -> int:
    """Count the parameters of the matrices in a peer's block."""
    matrices = 2 if peer == "nanogpt" else 3  # a GELU MLP has no gate
    mlp = matrices * shape.width * peer_hidden(peer, shape)
    return attention_matrices(shape, shape.width // shape.heads) + mlp


def peer_flops(peer: str, shape: Shape) -> int:
    """Count a peer's FLOPs a token as `summerlm.plan.count` counts ours.

    Args:
        peer: One of `PEERS`.
        shape: Its shape.

    Returns:
        FLOPs of matmuls forward and backward, causal attention counted once, no padding.
    """
    matrices = shape.layers * block_matrices(peer, shape) + shape.width * shape.vocabulary
    return 3 * (2 * matrices + shape.layers * 2 * shape.width * shape.context)


def shape_like(model: ModelConfig, rows: int) -> Shape:
    """Give the shape in which the original has as many parameters in a block as a model of ours.

    Args:
        model: The model's settings.
        rows: Rows of a step.

    Returns:
        The shape: layers, width, heads, context and vocabulary of the model, and F from what its
        attention and MLP have together; the original's heads divide the width.
    """
    shape = Shape(
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        kv_heads=model.heads,
        context=model.context,
        rows=rows,
        vocabulary=model.vocabulary,
    )
    attention = model.width * model.head_dim * 2 * (model.heads + model.kv_heads)
    block = attention + 3 * model.width * model.mlp_hidden
    free = block - attention_matrices(shape, model.width // model.heads)
    return replace(shape, hidden=round(free / (3 * model.width)))


def our_model(
    peer: str, shape: Shape, recipe: str = "modern", head_dim: int | None = None
) -> dict[str, Any]:
    """Make the settings `model.*` of ours that has the peer's shape.

    Args:
        peer: One of `PEERS`.
        shape: The shape.
        recipe: "modern", or "faithful" to the original: ALiBi, LayerScale, biases, dropout.
        head_dim: C of ours; None = the width over the heads.

    Returns:
        The table. Under "modern" F is the multiple of 64 that comes nearest to the peer's
        parameters: SwiGLU's three matrices for a GELU MLP's two, and what narrower heads leave.
    """
    head_dim = head_dim or shape.width // shape.heads
    free = block_matrices(peer, shape) - attention_matrices(shape, head_dim)
    table: dict[str, Any] = {
        "vocabulary": shape.vocabulary,
        "width": shape.width,
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": head_dim,
        "mlp_hidden": max(64, round(free / (3 * shape.width) / 64) * 64),
        "tied_embeddings": peer == "nanogpt",
        "context": shape.context,
    }
    if recipe == "faithful":
        table |= {
            "mlp_hidden": peer_hidden("original", shape),
            "mlp_bias": True,
            "norm_eps": 1e-8,
            "alibi": True,
            "qk_norm": False,
            "layer_scale": 0.01,
            "dropout": 0.1,
            "zero_init_outputs": False,
        }
    return table
