"""Windows on a stream of tokens: what a model reads at once, and which tokens it is asked for.

Flow: `text` and `protocols` cut streams by one of the rules here, each named after what cuts so,
and ask a model by `score`.

A stream is a list of ids, with BOS in front where a rule says so. A window reads
`ids[start:end]` and is asked for `ids[first + 1 : end + 1]`; every rule asks for a token once.

Shapes: B windows, T positions, N tokens asked for.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from summerlm.model.loss import IGNORE
from summerlm.model.transformer import Transformer

LOGIT_ROWS = 2048  # positions whose logits are held at once


class Window(NamedTuple):
    """A stretch of a stream; see above."""

    start: int
    first: int
    end: int


def rolling(length: int, context: int, stride: int) -> Iterator[Window]:
    """Cut a stream so that a token far into it has at least `context - stride` before it.

    The first window is asked for all its tokens, each further one for the `stride` that follow,
    the last for what is left; each reads as much as it can.

    Args:
        length: Tokens of the stream, BOS in front included.
        context: Positions read at most.
        stride: Tokens that a further window is asked for.

    Yields:
        Windows.

    Source:
        With a stride of the whole context these are lm-eval's windows: lm_eval/utils.py,
        get_rolling_token_windows with a context of one token, and make_disjoint_window.

    Example:
        >>> [tuple(window) for window in rolling(8, 4, 2)]
        [(0, 0, 4), (2, 4, 6), (3, 6, 7)]
    """
    scored, last = 0, length - 1
    while scored < last:
        end = min(last, scored + (stride if scored else context))
        yield Window(max(0, end - context), scored, end)
        scored = end


def strided(length: int, context: int, stride: int) -> Iterator[Window]:
    """Cut a stream as Hugging Face's guide does: a window begins every `stride` tokens.

    Of a window's `context` tokens the last is only asked for, never read. A window's first token
    has none before it: it is not asked for, unless a window before this one did.

    Args:
        length: Tokens of the stream.
        context: Tokens of a window at most.
        stride: Tokens from one window's beginning to the next one's.

    Yields:
        Windows.

    Source:
        Hugging Face transformers, docs, "Perplexity of fixed-length models".

    Example:
        >>> [tuple(window) for window in strided(8, 4, 2)]
        [(0, 0, 3), (2, 3, 5), (4, 5, 7)]
    """
    asked = 0
    for start in range(0, length, stride):
        end = min(start + context, length) - 1
        if (first := max(asked, start)) < end:
            yield Window(start, first, end)
        asked = end
        if end == length - 1:
            return


def blocks(length: int, size: int) -> Iterator[Window]:
    """Cut a stream into whole blocks, each asked for all tokens but its first; the tail is dropped.

    Args:
        length: Tokens of the stream.
        size: Tokens of a block.

    Yields:
        Windows.

    Example:
        >>> [tuple(window) for window in blocks(11, 4)]
        [(0, 0, 3), (4, 4, 7)]
    """
    for start in range(0, length - size + 1, size):
        yield Window(start, start, start + size - 1)


def score(
    model: Transformer, rows: Sequence[tuple[Tensor, Tensor]], device: torch.device
) -> list[Tensor]:
    """Ask a model for the tokens of some windows at once.

    Args:
        model: The model, in evaluation mode, without gradients, under the autocast wanted.
        rows: Of each window the ids read, (T,), int64, and the ids asked for, (up to T,), int64,
            those after its last positions.
        device: Where the model is.

    Returns:
        Nats of each id asked for, by window, (up to T,), float64, on the device.
    """
    longest = max(len(inputs) for inputs, _ in rows)
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)  # (B, T); padding comes last
    targets = torch.full_like(inputs, IGNORE)  # (B, T)
    for row, (read, asked) in enumerate(rows):
        end = len(read)
        inputs[row, :end] = read
        targets[row, end - len(asked) : end] = asked
    where = (targets != IGNORE).to(device)
    hidden = model(inputs.to(device))[where]  # (N, D)
    answers = targets.to(device)[where].split(LOGIT_ROWS)
    nats = [
        F.cross_entropy(model.logits(h), t, reduction="none").double()
        for h, t in zip(hidden.split(LOGIT_ROWS), answers, strict=True)
    ]
    return list(torch.cat(nats).split([len(asked) for _, asked in rows]))
