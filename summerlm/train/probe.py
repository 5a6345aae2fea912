"""How large attention's scores grow: the early sign of a run that will diverge.

Flow: `recipes` give it a row of the step that was just made; every rank calls it at the same
place, for a sharded model is put together block by block.

Shapes: B rows, T positions, D width, H query heads, K key/value heads, C channels a head,
Q queries at once.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from summerlm.model.attention import Attention
from summerlm.model.kernels import Frame
from summerlm.model.transformer import Transformer

QUERIES = 1024  # whose scores against all keys are in memory at once, of one head


def attention_logit_max(
    model: Transformer,
    tokens: Tensor,
    documents: Tensor,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Find the largest score of a query with a key that it may read.

    Scores are q . k / sqrt(C) in float32, over all layers, heads and causal pairs inside a
    document, without the bias channels: what learning drives up, not what documents are told
    apart by. It runs uncompiled and without dropout, and leaves the model as it was.

    Args:
        model: The model; its mode is kept.
        tokens: Ids, (B, T), int64.
        documents: Document of each token along its row, (B, T), int64.
        precision: Autocast's dtype, in which training runs; None = the weights' own.

    Returns:
        The largest score, (), float32, on the model's device.

    Source:
        Dehghani et al. 2023, arXiv:2302.05442, section 2; Wortsman et al. 2023, arXiv:2309.14322,
        section 3.1: the largest attention logit tells of an instability long before the loss.
    """
    found: list[Tensor] = []

    def look(module: Attention, arguments: tuple[Tensor, Frame]) -> None:
        x, frame, *_ = arguments
        q, k, _ = module.project(x, frame)
        found.append(_largest(q, k, documents) * module.head_dim**-0.5)

    autocast = torch.autocast(tokens.device.type, precision, enabled=precision is not None)
    with _aside(model), autocast, ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, Attention):
                hooks.callback(module.register_forward_pre_hook(look).remove)
        model(tokens, documents)
    return torch.stack(found).max()


@contextmanager
def _aside(model: Transformer) -> Iterator[None]:
    """Run a training model beside its training: no gradients, no dropout, no compilation."""
    training = model.training
    model.eval()
    try:
        # hooks would have compiled blocks compiled anew
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


def _largest(q: Tensor, k: Tensor, documents: Tensor) -> Tensor:
    """Give the largest q . k of queries (B, T, H, C) and keys (B, T, K, C) of one document."""
    T, H = q.shape[1:3]
    shared = H // k.shape[2]  # query heads of one key head
    best = q.new_full((), -torch.inf, dtype=torch.float32)
    positions = torch.arange(T, device=q.device)
    for start in range(0, T, QUERIES):
        some = slice(start, min(start + QUERIES, T))
        earlier = positions[: some.stop]  # no query of these reads later keys
        readable = (documents[:, some, None] == documents[:, None, : some.stop]) & (
            positions[some, None] >= earlier
        )  # (B, Q, S)
        for head in range(H):
            with torch.autocast(q.device.type, enabled=False):
                keys = k[:, : some.stop, head // shared].float()
                scores = q[:, some, head].float() @ keys.mT  # (B, Q, S)
            best = torch.maximum(best, scores.masked_fill(~readable, -torch.inf).amax())
    return best
