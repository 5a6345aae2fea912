"""How well a model predicts text: nats a token, perplexity, bits per byte.

Flow:
    1. `measure` encodes documents; each begins with BOS, of which only what follows is scored;
    2. `cut_windows` cuts a document so that every token is scored once, with left context;
    3. windows of about equal length are scored together and summed into a `TextScore`.
`protocols` measures the same and, beside it, what others mean by perplexity.

Shapes: T positions of a window.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from summerlm.core.errors import UsageError
from summerlm.core.ranks import ALONE, Ranks
from summerlm.eval.windows import rolling, score
from summerlm.model.packed import scoring
from summerlm.model.transformer import Transformer
from summerlm.tokenizer.tokenizer import Tokenizer

GROUP = 8  # documents encoded at once for each row of a batch: windows to choose equal lengths from


@dataclass(frozen=True)
class TextScore:
    """What a model said to a text.

    Attributes:
        nats: Summed cross-entropy of all tokens.
        tokens: Tokens scored: all but each document's BOS.
        bytes: Length of the documents in UTF-8.
        documents: How many there were.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Equally likely tokens that the model is left with, on average."""
        return torch.tensor(self.loss, dtype=torch.float64).exp().item()

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of UTF-8: comparable whatever the tokenizer."""
        return self.nats / math.log(2) / self.bytes


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    context: int,
    stride: int | None = None,
    batch_rows: int = 8,
    precision: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> TextScore:
    """Score documents, each by itself and in full.

    A document's first window scores its first `context` tokens. Each further window ends up to
    `stride` tokens later, scores only those, and reads `context` positions, so that a token far
    into a document has at least `context - stride` tokens of left context. EOS is not scored.

    Args:
        model: The model, on any device; dropout is off meanwhile.
        tokenizer: The model's tokenizer.
        documents: Texts; read as they are needed.
        context: Positions that a window reads at most.
        stride: New targets of a window; None = half the context.
        batch_rows: Windows scored at once.
        precision: Autocast's dtype; None = the weights' own.
        ranks: Who shares the work: every rank calls this with the same documents.

    Returns:
        The sums over all documents, the same on all ranks.

    Raises:
        UsageError: If the context is longer than the model's, the stride doesn't fit the context,
            or the documents hold no token.
    """
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= context <= model.config.context:
        raise UsageError(f"context {context}: the model reads 1 to {model.config.context}")
    if not 1 <= stride <= context:
        raise UsageError(f"stride {stride}: must be 1 to the context, {context}")
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = size = count = 0
    rest = iter(documents)
    with scoring(model, precision):
        while texts := list(islice(rest, GROUP * batch_rows)):
            windows: list[tuple[Tensor, Tensor]] = []
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                windows += cut_windows(torch.tensor([tokenizer.bos, *ids]), context, stride)
                tokens, size, count = tokens + len(ids), size + len(text.encode()), count + 1
                # one vocabulary writes the space as U+2581 and can't tell the two apart
                assert "\u2581" in text or tokenizer.count_bytes(ids) == len(text.encode())
            windows.sort(key=lambda window: len(window[0]))
            batches = [windows[i : i + batch_rows] for i in range(0, len(windows), batch_rows)]
            for turn in range(0, len(batches), ranks.world):
                own = turn + ranks.rank
                # where no batch is left a rank reads another's: a sharded model is read by all
                found = score(model, batches[own if own < len(batches) else turn], device)
                nats += torch.cat(found).sum() if own < len(batches) else 0
    ranks.sum(nats)
    if not tokens:
        raise UsageError(f"nothing to measure: {count} documents hold no text")
    return TextScore(nats.item(), tokens, size, count)


def cut_windows(ids: Tensor, context: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a document into windows; see `measure`.

    Args:
        ids: BOS and the document, (1 + tokens,), int64.
        context: Positions that a window reads at most.
        stride: New targets of each window but the first.

    Yields:
        What a window reads, (T,), and what it is asked for at its end, (up to T,): each token but
        BOS is asked for once, in order; nothing for a document without tokens.
    """
    for start, first, end in rolling(len(ids), context, stride):
        yield ids[start:end], ids[first + 1 : end + 1]
