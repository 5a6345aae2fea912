"""The shape that both sides of a comparison have, and this project's model of that shape.

Flow: `peers.py` makes a `Shape` of its arguments and gives it to each side; `our_model` sizes the
MLP of ours so that a block has as many parameters as the peer's.

Shapes: D width, F hidden channels of an MLP, V vocabulary, T context, H heads, C channels a head.
"""

from dataclasses import dataclass
from typing import Any

PEERS = ("nanogpt", "original", "llama")
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
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    context: int
    rows: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.context


def peer_hidden(peer: str, width: int) -> int:
    """Give the hidden channels of a peer's MLP.

    Args:
        peer: One of `PEERS`.
        width: D.

    Returns:
        F: nanoGPT's own factor, the original's as published, Llama's rule (8/3 of the width,
        rounded up to 256).
    """
    if peer == "nanogpt":
        return 4 * width
    return int(EXPANSION * width) if peer == "original" else -(-8 * width // 3 // 256) * 256


def attention_matrices(shape: Shape, head_dim: int) -> int:
    """Count the parameters of a block's attention."""
    return shape.width * head_dim * 2 * (shape.heads + shape.kv_heads)


def block_matrices(peer: str, shape: Shape) -> int:
    """Count the parameters of the matrices in a peer's block."""
    matrices = 2 if peer == "nanogpt" else 3  # a GELU MLP has no gate
    mlp = matrices * shape.width * peer_hidden(peer, shape.width)
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


def torchtitan_flops(model: dict[str, Any], parameters: int) -> int:
    """Count FLOPs a token as torchtitan does: the number beside ours.

    Args:
        model: The settings `model.*`.
        parameters: Of the model, unpadded.

    Returns:
        6 for each parameter that isn't looked up, and attention as if every query read all keys.

    Source:
        torchtitan, `get_dense_model_nparams_and_flops`.
    """
    table = 0 if model.get("tied_embeddings") else model["vocabulary"] * model["width"]
    attention = model["layers"] * model["heads"] * model["head_dim"] * model["context"]
    return 6 * (parameters - table) + 12 * attention


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
            "mlp_hidden": peer_hidden("original", shape.width),
            "mlp_bias": True,
            "norm_eps": 1e-8,
            "alibi": True,
            "qk_norm": False,
            "layer_scale": 0.01,
            "dropout": 0.1,
            "zero_init_outputs": False,
        }
    return table
