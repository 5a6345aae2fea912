"""Plain attention: products of matrices and a softmax, for a few queries at once.

On CPUs the scores of a few queries fit a cache, and keys that come later are left out: two to three
times as fast as torch's flash attention there (LOG.md). The probabilities are kept for the
backward pass.

Both passes are operations of torch's, which a compiler calls as they are: what it makes of them
block by block is slower, and takes long to make.

Flow: called by `kernels.Masked`.

Shapes: B rows, T positions, P positions with those before them, H query heads, K key/value heads (K
divides H), G = H / K, C channels a head, Q queries at once, S keys up to the last of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

QUERIES = 128  # at once


@torch.library.custom_op("summerlm::plain_attention", mutates_args=())
def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float
) -> tuple[Tensor, list[Tensor]]:
    """Softmax of biased scores times values, a block of queries against the keys up to it.

    Args:
        q: Queries, (B, H, T, C), of the last T positions.
        k: Keys, (B, K, P, C) with P >= T.
        v: Values, (B, K, P, C).
        bias: Added to scores, (B, 1, T, P) or (B, H, T, P).
        dropout: Share of the probabilities dropped.

    Returns:
        The averages, (B, T, H, C), contiguous, as what follows reads them, and for each block its
        probabilities, (BK, GQ, S), and where some are dropped a mask of the others.
    """
    B, H, T, C = q.shape
    before = k.shape[2] - T
    q, k, v = _flatten(q, k, v)
    out, kept = q.new_empty(B, T, H, C), []
    for some in _blocks(T):
        keys = slice(0, before + some.stop)  # no query of these reads later ones
        # a part of the keys is copied by the product anyway, and slowly where it is transposed
        scores = q[:, :, some].reshape(len(k), -1, C) @ k[:, keys].contiguous().mT  # (BK, GQ, S)
        view = scores.view(B, H, -1, keys.stop)
        torch.add(bias[:, :, some, keys], view, alpha=C**-0.5, out=view)
        p = scores.softmax(-1)
        kept.append(p)
        if dropout:
            p, mask = torch.native_dropout(p, dropout, True)
            kept.append(mask)
        out[:, some] = (p @ v[:, keys]).view(B, H, -1, C).transpose(1, 2)
    return out, kept


@torch.library.custom_op("summerlm::plain_attention_backward", mutates_args=())
def plain_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor], dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `plain_attention`; gradients of keys and values add up in float32.

    Args:
        gradient: Of the averages, (B, T, H, C).
        q: Queries, (B, H, T, C).
        k: Keys, (B, K, P, C).
        v: Values, (B, K, P, C).
        kept: What `plain_attention` returned beside the averages.
        dropout: As it was.

    Returns:
        Gradients of queries, keys and values, shaped as these.
    """
    shapes, T, C = (q.shape, k.shape, v.shape), q.shape[2], q.shape[3]
    before = k.shape[2] - T
    q, k, v = _flatten(q, k, v)
    dq = q.new_empty(q.shape)
    dk, dv = (k.new_empty(k.shape, dtype=torch.float32) for _ in range(2))
    remaining = reversed(kept)
    for some in reversed(_blocks(T)):  # the last one reads all keys
        keys = slice(0, before + some.stop)
        mask = next(remaining) if dropout else None
        p = next(remaining)
        g = gradient[:, some].transpose(1, 2).reshape(len(k), -1, C)  # (BK, GQ, C)
        dp, used = g @ v[:, keys].contiguous().mT, p  # (BK, GQ, S)
        if dropout:
            scale = 1 / (1 - dropout)
            dp, used = (torch.ops.aten.native_dropout_backward(x, mask, scale) for x in (dp, p))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq[:, :, some] = (ds @ k[:, keys]).view(len(k), len(q[0]), -1, C)
        dk_here, dv_here = ds.mT @ q[:, :, some].reshape(len(k), -1, C), used.mT @ g
        if some.stop == T:
            dk.copy_(dk_here)
            dv.copy_(dv_here)
        else:
            dk[:, keys] += dk_here
            dv[:, keys] += dv_here
    scale = C**-0.5
    found = dq.mul_(scale), dk.mul_(scale).to(k.dtype), dv.to(v.dtype)
    dq, dk, dv = (x.view(shape) for x, shape in zip(found, shapes, strict=True))
    return dq, dk, dv


@plain_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> tuple[Tensor, list[Tensor]]:
    rows, queries, T = len(q) * k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    before = k.shape[2] - T
    kept = []
    for some in _blocks(T):
        shape = (rows, queries * (some.stop - some.start), before + some.stop)
        kept.append(q.new_empty(shape))
        if dropout:
            kept.append(q.new_empty(shape, dtype=torch.bool))
    return q.new_empty(q.transpose(1, 2).shape), kept


@plain_attention_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor], dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    q, k, v, _, ctx.dropout = inputs
    ctx.save_for_backward(q, k, v, *output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, *kept = ctx.saved_tensors
    return (*plain_attention_backward(gradient, q, k, v, kept, ctx.dropout), None, None)


plain_attention.register_autograd(_differentiate, setup_context=_save)


def _flatten(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make batches of one product: the query heads of a key head together, (BK, G, T, C)."""
    B, H, T, C = q.shape
    K = k.shape[1]
    q = q.reshape(B * K, H // K, T, C)
    return q, k.reshape(B * K, -1, C), v.reshape(B * K, -1, C)


def _blocks(T: int) -> list[slice]:
    """Cut T queries into runs of at most `QUERIES`."""
    return [slice(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]
