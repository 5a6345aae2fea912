"""Several prompts completed at once, each as if it were alone.

Flow: `engine.LanguageModel.complete` makes a `Completion` of each prompt and lets `write` finish
them: padding stands in front of the shorter prompts, so that all go on at the same place; whoever
is done leaves the batch.

Shapes: B rows, T positions of the longest prompt, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from summerlm.core.errors import SummerError
from summerlm.generate.cache import Cache
from summerlm.model.transformer import Transformer
from summerlm.tokenizer.tokenizer import Tokenizer

PADDING, TEXT = -1, 0  # documents: padding loses to all text, and text's scores stay as they are


class Completion:
    """A prompt, and what is written after it.

    Args:
        prompt: Ids, with BOS in front unless it was cut.
        tokenizer: Gives the text of ids.
        stop: Texts that end the completion.

    Attributes:
        text: What is written so far; without what ends it.
        done: Whether nothing is to be added.
    """

    def __init__(self, prompt: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.prompt = list(prompt)
        self.text = ""
        self.done = False
        self._eos, self._stop = tokenizer.eos, stop
        self._reach = max(map(len, stop), default=1) - 1  # of a stop text, before the latest piece
        self._stream = tokenizer.stream()
        for token in self.prompt:
            self._stream.push(token)  # so that the first word written keeps the space before it

    def push(self, token: int) -> None:
        """Add a token, unless it ends the text."""
        if token == self._eos:
            self.finish()
        else:
            self._add(self._stream.push(token))

    def finish(self) -> None:
        """Add nothing more."""
        if not self.done:
            self._add(self._stream.flush())
            self.done = True

    def _add(self, piece: str) -> None:
        start = max(0, len(self.text) - self._reach)
        self.text += piece
        ends = [end for stop in self._stop if (end := self.text.find(stop, start)) >= 0]
        if ends:
            self.text, self.done = self.text[: min(ends)], True


def write(
    model: Transformer,
    completions: Sequence[Completion],
    max_tokens: int,
    agree: Callable[[Tensor], Tensor],
) -> None:
    """Complete one batch, always by the likeliest token.

    Args:
        model: The model, in evaluation mode.
        completions: The rows; prompts and `max_tokens` together fit the context.
        max_tokens: Most tokens of a completion.
        agree: Applied to the tokens of each step, (B,).

    Raises:
        SummerError: If the model says NaN.
    """
    longest = max(len(row.prompt) for row in completions)
    padded = [[0] * (longest - len(row.prompt)) + row.prompt for row in completions]
    device = model.head_weight.device
    new = torch.tensor(padded, device=device)  # (B, T)
    lengths = torch.tensor([len(row.prompt) for row in completions], device=device)
    padding = torch.arange(longest, device=device) < longest - lengths[:, None]
    documents = torch.where(padding, PADDING, TEXT)  # (B, T)
    cache = Cache(model.config.layers, longest + max_tokens - 1)  # the last token is never read
    rows = list(completions)
    for _ in range(max_tokens):
        hidden = model(new, documents, cache)
        best, drawn = model.logits(hidden[:, -1]).max(-1)  # (B,) each
        if best.isnan().any():  # which is the largest of all to torch
            raise SummerError("the model says NaN of what comes next")
        drawn = agree(drawn)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            row.push(token)
        left = [number for number, row in enumerate(rows) if not row.done]
        if not left:
            return
        if len(left) < len(rows):
            rows = [rows[number] for number in left]
            kept = torch.tensor(left, device=device)
            cache.keep(kept)
            drawn = drawn[kept]
        new = drawn[:, None]
        documents = torch.full_like(new, TEXT)
    for row in rows:
        row.finish()


def batches(
    completions: Sequence[Completion], max_tokens: int, positions: int
) -> Iterator[list[Completion]]:
    """Put prompts of about equal length together, the longest first.

    Args:
        completions: All.
        max_tokens: Most tokens of a completion.
        positions: How many a batch's cache may hold; a row that needs more goes alone.

    Yields:
        Batches.
    """
    batch: list[Completion] = []
    for row in sorted(completions, key=lambda row: -len(row.prompt)):
        if batch and (len(batch) + 1) * (len(batch[0].prompt) + max_tokens) > positions:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
