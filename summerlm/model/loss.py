"""The training objective, without ever holding all logits.

Flow: takes the final hidden states of `transformer.Transformer` and the targets of a batch;
returns sums, which `train.step` adds over micro-batches and ranks before the one division that
makes them a mean. Logits, N * Vp float32, would be the largest tensor of a step: here a chunk of
rows makes its logits, its loss and its gradients at once, and is forgotten.

Shapes: N tokens (B * T flattened), D width, V vocabulary, Vp vocabulary padded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # target of a token that carries no loss; torch's own default


@dataclass(frozen=True)
class Loss:
    """Sums over the targets that count."""

    total: Tensor
    """Cross-entropy and z-loss in nats, (), float32, differentiable."""
    count: Tensor
    """Targets that counted, (), int64."""
    per_target: Tensor
    """Cross-entropy of each target in nats, (N,), float32, detached; 0 where ignored."""


def next_token_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    chunk_tokens: int = 2048,
    compiled: bool = False,
) -> Loss:
    """Sum the cross-entropy of all targets, and make its gradients on the way.

    Args:
        hidden: Final hidden states, (N, D), any float dtype.
        head: Output embedding, (Vp, D); rows from `vocabulary` on are padding and never win.
        targets: Id of each next token, (N,), int64; `IGNORE` where none counts.
        vocabulary: Token ids that exist, V <= Vp.
        soft_cap: Logits become cap * tanh(logits / cap); None leaves them.
        z_loss: Weight of the squared log partition function, which keeps logits from drifting.
        chunk_tokens: Rows of logits alive at once, at least 1.
        compiled: Whether what goes through the logits is compiled into few passes.

    Returns:
        The sums; the mean is `total / count`, NaN where no target counts.

    Raises:
        ValueError: If `hidden` and `targets` disagree on N.

    Source:
        Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss); Hsu et al. 2024,
        arXiv:2410.10989, section 3.2 (gradients made in the forward pass).

    Example:
        >>> hidden, head = torch.zeros(4, 8), torch.zeros(16, 8)
        >>> targets = torch.tensor([1, 2, IGNORE, 3])
        >>> loss = next_token_loss(hidden, head, targets, vocabulary=10)
        >>> round((loss.total / loss.count).item(), 4), loss.count.item()  # ln 10: a guess
        (2.3026, 3)
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states but {targets.shape[0]} targets")
    function = _compiled_lose() if compiled else _lose
    lose = partial(function, vocabulary=vocabulary, soft_cap=soft_cap, z_loss=z_loss)
    total, per_target = _ChunkedLoss.apply(
        hidden, head, targets, lose, chunk_tokens, torch.is_grad_enabled()
    )
    return Loss(total, (targets != IGNORE).sum(), per_target)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of losses whose gradients exist when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        lose: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        chunk_tokens: int,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        weight = head.to(dtype)  # once, not once a chunk
        total = hidden.new_zeros((), dtype=torch.float32)
        per_target = torch.zeros_like(targets, dtype=torch.float32)
        if with_gradients:
            ctx.hidden_gradient = torch.empty_like(hidden)
            # transposed: with (Vp, chunk) on the left CPUs multiply a third more slowly
            ctx.head_gradient = hidden.new_zeros(head.shape[::-1], dtype=torch.float32)  # (D, Vp)
        with torch.autocast(kind, enabled=False):  # dtypes are explicit below
            for start in range(0, len(targets), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                h = hidden[rows].to(dtype)
                loss, z, odds, index, own, share = lose(F.linear(h, weight), targets[rows])
                per_target[rows] = loss
                total += loss.sum() + z
                if with_gradients:
                    # `scatter_` takes bf16 to float32 and back, all of it, on CPUs
                    odds[torch.arange(len(odds), device=odds.device), index] = own  # (chunk, Vp)
                    # what makes odds probabilities meets the few columns of the products
                    ctx.hidden_gradient[rows] = (odds @ weight) * share
                    ctx.head_gradient += (h * share).to(dtype).T.contiguous() @ odds
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(per_target)
        return total, per_target

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0]
        hidden = ctx.hidden_gradient * scale.to(ctx.hidden_gradient.dtype)
        head = torch.empty(ctx.head_gradient.T.shape, dtype=torch.float32, device=hidden.device)
        torch.mul(ctx.head_gradient.T, scale, out=head)  # (Vp, D), in the weights' order again
        return hidden, head.to(ctx.head_dtype), None, None, None, None


@cache
def _compiled_lose() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_lose, dynamic=False)


def _lose(
    raw: Tensor, targets: Tensor, vocabulary: int, soft_cap: float | None, z_loss: float
) -> tuple[Tensor, ...]:
    """Turn a chunk of logits into losses and their gradient.

    Args:
        raw: Raw logits, (chunk, Vp), any float dtype; afterwards spoilt where they are float32.
        targets: Ids, (chunk,), int64, or `IGNORE`.
        vocabulary: Token ids that exist.
        soft_cap: See `next_token_loss`.
        z_loss: See `next_token_loss`.

    Returns:
        Cross-entropy of each target, (chunk,), 0 where ignored; the summed z-loss, (). Then the
        gradient d(sum of losses) / d(raw logits) in factors: odds against the likeliest id,
        (chunk, Vp), in the logits' dtype, but for the targets' own: at which ids these stand,
        (chunk,), and what belongs there, (chunk,); and by what each row is to be multiplied,
        (chunk, 1), float32. A compiler can't put the targets' own in on its way; and taken from
        the float32 odds they lose nothing where one is nearly sure.
    """
    logits = raw.float()  # bf16 sums lose the tail
    logits[:, vocabulary:] = 0  # finite for the cap's slope; cut off below
    slope = None
    if soft_cap is not None:
        logits.div_(soft_cap).tanh_()
        slope = 1 - logits.square()  # of cap * tanh(x / cap)
        logits.mul_(soft_cap)
    logits[:, vocabulary:] = -torch.inf
    counts = targets != IGNORE
    index = targets.where(counts, 0)[:, None]
    peak = logits.amax(-1, keepdim=True)
    own = logits.gather(1, index) - peak  # the target's logit, (chunk, 1)
    mass = logits.sub_(peak).exp_().sum(-1)  # a third of the time of logsumexp and softmax
    loss = (mass.log() - own[:, 0]).where(counts, 0)
    partition = mass.log() + peak[:, 0]
    z = z_loss * partition.square().where(counts, 0).sum()

    weight = 1 + 2 * z_loss * partition  # of the softmax in each row
    share = (weight / mass).where(counts, 0)[:, None]
    target = own.exp() - (mass / weight)[:, None]
    if slope is not None:
        logits.mul_(slope)
        target = target * slope.gather(1, index)
    dtype = raw.dtype
    return loss, z, logits.to(dtype), index[:, 0], target[:, 0].to(dtype), share
