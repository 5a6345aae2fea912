"""What a run looks at on its way: held-out loss and samples.

Flow: `pretrain` makes one `Watch`; its methods are hooks, its results go to the recorder.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from summerlm.checkpoint.best import Measured
from summerlm.core.errors import UsageError
from summerlm.core.progress import PATIENCE_S
from summerlm.core.ranks import Ranks
from summerlm.core.record import Recorder
from summerlm.data.sources import Source
from summerlm.data.tokens.reading import TokenSource
from summerlm.eval.text import TextScore, measure
from summerlm.generate.engine import LanguageModel
from summerlm.parallel.layout import Layout
from summerlm.recipes.opening import Run
from summerlm.recipes.settings import HELD_OUT_LOSS, SamplesConfig
from summerlm.train.loop import Event

EVAL_ROWS = 8  # windows measured at once


class Watch:
    """Measures and samples one model while it trains.

    Args:
        run: The run; every rank watches it, in step with the others.
        recorder: Takes the results.
        see: Shown the held-out loss.

    Raises:
        UsageError: If a prompt is longer than the context, or checkpoints are to be judged by the
            loss of held-out texts and there is none.
    """

    def __init__(self, run: Run, recorder: Recorder, see: Callable[[Measured], None]) -> None:
        settings = run.settings
        self._run, self._see = run, see
        self._weights = {name: s.weight for name, s in settings.data.sources.items()}
        self._context = settings.model.context
        self._config: SamplesConfig = settings.samples
        self._recorder = recorder
        for prompt in settings.samples.prompts:
            if (length := 1 + len(run.tokenizer.encode(prompt))) > self._context:
                raise UsageError(
                    f"samples.prompts: {prompt[:40]!r} has {length} tokens with BOS, "
                    f"model.context is {self._context}"
                )
        limit = settings.validation.characters_per_source
        recorder.write("note", line="reading held-out texts and the first batch ...")
        self._expected_s = PATIENCE_S  # that a measurement takes; the first one is announced
        self._held_out = {source.name: list(take_text(source, limit)) for source in run.sources}
        if settings.evaluation.metric == HELD_OUT_LOSS and not any(self._held_out.values()):
            raise UsageError(
                f"evaluation.metric = {HELD_OUT_LOSS!r}, and no source has held-out text; see "
                "data.held_out_fraction"
            )

    def validate(self, event: Event) -> None:
        """Measure every source's held-out text and the mean by the sources' weights.

        Args:
            event: The step after which it is measured.
        """
        began = time.monotonic()
        if any(self._held_out.values()) and self._expected_s >= PATIENCE_S:
            line = f"step {event.step}: measuring the held-out text ..."
            self._recorder.write("note", line=line)
        with evaluating(self._run.layout):
            scores = {name: self._measure(texts) for name, texts in self._held_out.items() if texts}
        if not scores:
            return
        self._expected_s = time.monotonic() - began
        total = sum(self._weights[name] for name in scores)
        loss = sum(self._weights[name] * s.loss for name, s in scores.items()) / total
        self._see(Measured(event.step, HELD_OUT_LOSS, loss, higher_is_better=False))
        parts = ", ".join(f"{name} {s.bits_per_byte:.3f}" for name, s in scores.items())
        self._recorder.write(
            "validation",
            step=event.step,
            tokens=event.tokens,
            held_out_loss=loss,
            held_out_loss_by_source={name: s.loss for name, s in scores.items()},
            bits_per_byte_by_source={name: s.bits_per_byte for name, s in scores.items()},
            line=f"step {event.step}: held-out loss {loss:.4f}; bits per byte: {parts}",
        )

    def sample(self, event: Event) -> None:
        """Complete the prompts.

        Args:
            event: The step after which it is done.
        """
        run = self._run
        autocast = torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None)
        with evaluating(run.layout), autocast:
            lm = LanguageModel(
                run.layout.model, run.tokenizer, agree=partial(follow_leader, run.ranks)
            )
            for prompt in self._config.prompts:
                text = lm.generate(prompt, max_tokens=self._config.tokens)
                line = f"step {event.step}: {' '.join((prompt + text).split())}"
                self._recorder.write("sample", line, step=event.step, prompt=prompt, text=text)

    def _measure(self, texts: list[str]) -> TextScore:
        return measure(
            self._run.layout.model,
            self._run.tokenizer,
            texts,
            context=self._context,
            stride=self._context,
            batch_rows=EVAL_ROWS,
            precision=self._run.dtype,
            ranks=self._run.ranks,
        )


def follow_leader(ranks: Ranks, token: Tensor) -> Tensor:
    """Go on with what the leading rank drew, for all ranks read a model together.

    Args:
        ranks: Who reads it; every rank calls this at the same place.
        token: What this rank drew, a token a row, (B,).

    Returns:
        What the leading rank drew, on this rank's device.
    """
    drawn = ranks.exchange(token.tolist())[0]
    return torch.tensor(drawn, device=token.device)


def longest_text(characters: int) -> int:
    """Tell how much is taken of one text, so that several fit into so many characters."""
    return max(1, characters // 8)


def take_text(source: Source | TokenSource, characters: int) -> Iterator[str]:
    """Take the first held-out texts of a source, each cut so that several fit.

    Args:
        source: The source.
        characters: How many characters to take in all.

    Yields:
        Texts in the source's pinned order.
    """
    longest = longest_text(characters)
    for text in source.held_out() if characters else ():
        yield text[: min(longest, characters)]
        characters -= min(longest, len(text))
        if characters <= 0:
            return


@contextmanager
def evaluating(layout: Layout) -> Iterator[None]:
    """Put a training model into evaluation mode for a while, uncompiled.

    Compiled blocks would be compiled anew for each new shape of a prompt or a last window. Each
    pass is a sign of life, for a task of many may take longer than any part of a step.

    Args:
        layout: The model over its ranks; it returns to training mode.

    Yields:
        Nothing.
    """
    layout.model.eval()
    sign = layout.model.register_forward_pre_hook(lambda *_: layout.ranks.moves())
    try:
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            yield
    finally:
        sign.remove()
        layout.rest()
        layout.model.train()
