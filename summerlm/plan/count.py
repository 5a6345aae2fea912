"""How large a model is, and what a token costs.

Flow: read by the planner's command, by the run's description, and by the MFU in its records.

Shapes: T context, D width, H query heads, C channels a head, V vocabulary.
"""

import torch

from summerlm.model.config import ModelConfig
from summerlm.model.transformer import Transformer


def parameters(config: ModelConfig, padded: bool = False) -> int:
    """Count a model's parameters, on the model itself, built without memory.

    Args:
        config: The model's settings.
        padded: Whether the rows count that only fill the vocabulary up.

    Returns:
        The number of parameters; tied embeddings count once.
    """
    with torch.device("meta"):
        model = Transformer(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    tables = 1 if config.tied_embeddings else 2
    padding = tables * (config.padded_vocabulary - config.vocabulary) * config.width
    return count if padded else count - padding


def parameters_without_embeddings(config: ModelConfig) -> int:
    """Count a model's parameters but for the embedding and the head; tied ones are one table."""
    tables = 1 if config.tied_embeddings else 2
    return parameters(config) - tables * config.vocabulary * config.width


def flops_per_token_full(config: ModelConfig) -> int:
    """Count FLOPs as torchtitan does: attention over all T keys of a query, not the causal half.

    Beside the models' own count it shows what part of a published MFU is a way of counting.

    Args:
        config: The model's settings.

    Returns:
        Six for each parameter that multiplies (all but the embedding's table, norms and biases
        and vocabulary padding included), and attention in full, backward as twice forward.

    Source:
        torchtitan, `get_dense_model_nparams_and_flops`; Chowdhery et al. 2022, arXiv:2204.02311,
        appendix B.
    """
    table = 0 if config.tied_embeddings else config.padded_vocabulary * config.width
    attention = config.layers * config.heads * config.head_dim * config.context
    return 6 * (parameters(config, padded=True) - table) + 12 * attention


def flops_per_token(config: ModelConfig) -> int:
    """Count the floating-point operations of training on one token of a full row.

    Only what the model needs counts: matmuls, forward and twice as much backward; a query's
    T/2 causal keys of the whole T; nothing for the embedding's look-up, vocabulary padding, bias
    channels, elementwise work or recomputation.

    Args:
        config: The model's settings.

    Returns:
        FLOPs, a multiply-add being two.

    Source:
        Kaplan et al. 2020, arXiv:2001.08361, section 2.1, with causal attention counted once.
    """
    matrices = config.layers * _products(config) + config.width * config.vocabulary
    # scores and averages: 2 matmuls * 2 FLOPs * T/2 keys
    attention = 2 * config.heads * config.head_dim * config.context
    return 3 * (2 * matrices + config.layers * attention)


def _products(config: ModelConfig) -> int:
    """Count the elements of a block's matrices."""
    D, attention = config.width, config.heads * config.head_dim
    block = D * (attention + 2 * config.kv_heads * config.head_dim)  # queries, keys, values
    block += attention * D  # output
    return block + D * 2 * config.mlp_hidden + config.mlp_hidden * D  # gate and up, down
