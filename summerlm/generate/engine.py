"""A model and its tokenizer as one thing that completes text.

Flow:
    1. a prompt becomes BOS and the ids of its plain text;
    2. one pass reads them all into a `Cache`;
    3. `sample` picks a token, the next pass reads only that token;
    4. until EOS, `max_tokens`, or a full context.
`checkpoint.load` gives the parts; `summerlm.load`, the command line and the server use the whole;
tasks that are answered by writing have `complete` write many answers at once.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from summerlm.core.errors import UsageError
from summerlm.generate.cache import Cache
from summerlm.generate.rows import Completion, batches, write
from summerlm.generate.sampling import check_sampling, sample
from summerlm.model.config import ModelConfig
from summerlm.model.packed import packed
from summerlm.model.transformer import Transformer
from summerlm.tokenizer.tokenizer import Tokenizer

CACHED = {"cpu": 16384}  # positions that the caches of several rows hold together
CACHED_ELSEWHERE = 65536


class LanguageModel:
    """Completes prompts and scores tokens.

    Args:
        model: The model, in evaluation mode, on any device.
        tokenizer: The tokenizer that it was trained with.
        agree: What is applied to the tokens that are drawn, one a row, (B,): ranks that hold one
            model between them must go on with the same.

    Raises:
        UsageError: If model and tokenizer differ in their vocabulary.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        agree: Callable[[Tensor], Tensor] = lambda token: token,
    ) -> None:
        if model.config.vocabulary != tokenizer.vocabulary:
            raise UsageError(
                f"the model knows {model.config.vocabulary} tokens, "
                f"the tokenizer {tokenizer.vocabulary}: they don't belong together"
            )
        self.model = model
        self.tokenizer = tokenizer
        self._agree = agree

    @property
    def config(self) -> ModelConfig:
        """The model's settings."""
        return self.model.config

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_at_eos: bool = True,
    ) -> str:
        """Complete a prompt.

        Args:
            prompt: Any text, read as text: `<s>` in it is three characters.
            max_tokens: Most tokens to write, at least 1. Writing stops earlier when the context
                is full: prompt and completion share `config.context` tokens, of which BOS is one
                and the completion's last is none, for nothing reads it.
            temperature: Divides the scores; 0 takes the likeliest token.
            top_k: How many tokens can be drawn at most; None for all.
            top_p: Probability that the tokens that can be drawn reach together; None for all.
            seed: Of the draws: the same request gives the same text.
            stop_at_eos: Whether the model's end-of-text ends the completion.

        Returns:
            The completion, without the prompt.

        Raises:
            UsageError: If the prompt is longer than the context, or a value means nothing.
        """
        return "".join(
            self.stream(
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop_at_eos=stop_at_eos,
            )
        )

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_at_eos: bool = True,
    ) -> Iterator[str]:
        """Complete a prompt piece by piece; joined, the pieces are what `generate` returns.

        Args:
            prompt: See `generate`.
            max_tokens: See `generate`.
            temperature: See `generate`.
            top_k: See `generate`.
            top_p: See `generate`.
            seed: See `generate`.
            stop_at_eos: See `generate`.

        Returns:
            The completion's pieces, each of whole characters, as they are written.

        Raises:
            UsageError: If the prompt is longer than the context, or a value means nothing.
        """
        check_sampling(temperature, top_k, top_p)
        if max_tokens < 1:
            raise UsageError(f"max_tokens = {max_tokens}: should be at least 1")
        ids = self._checked([self.tokenizer.bos, *self.tokenizer.encode(prompt)])
        draw = partial(
            sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator(ids.device).manual_seed(seed),
        )
        return self._write(ids, max_tokens, draw, self.tokenizer.eos if stop_at_eos else None)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        precision: torch.dtype | None = None,
    ) -> list[str]:
        """Complete many prompts, always by the likeliest token, several at once.

        Args:
            prompts: Ids of each, with BOS in front. A prompt that leaves no room for `max_tokens`
                in the context loses its beginning, as in lm-eval.
            max_tokens: Most tokens to write after each, below the context.
            stop: Texts that end a completion; so does the model's end-of-text.
            precision: Autocast's dtype; None = the weights' own.

        Returns:
            The completions, each cut before the first stop text in it.

        Raises:
            UsageError: If a prompt is empty or has unknown ids, or a value means nothing.
            SummerError: If the model says NaN.
        """
        room = self.config.context - max_tokens
        if max_tokens < 1 or room < 1:
            raise UsageError(
                f"max_tokens = {max_tokens}: should be 1 to {self.config.context - 1}, "
                "so that the context holds a prompt too"
            )
        if "" in stop:
            raise UsageError("stop: an empty text would end every completion before it begins")
        cut = [tuple(prompt[-room:]) for prompt in prompts]
        for prompt in cut:
            self._checked(prompt)
        completions = {ids: Completion(ids, self.tokenizer, stop) for ids in dict.fromkeys(cut)}
        device = self.model.head_weight.device
        positions = CACHED.get(device.type, CACHED_ELSEWHERE)
        autocast = torch.autocast(device.type, precision, enabled=precision is not None)
        with self._reading(), autocast, packed(self.model):
            for batch in batches(list(completions.values()), max_tokens, positions):
                write(self.model, batch, max_tokens, self._agree)
        return [completions[ids].text for ids in cut]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Score every possible next token after each of some ids.

        Args:
            ids: Tokens of one row as they are: no BOS is added.

        Returns:
            Logits, (T, V), float32, on the model's device; row t scores what follows `ids[t]`.

        Raises:
            UsageError: If there are no ids, more than the context, or unknown ones.
        """
        return self._score(self._checked(ids))

    def _write(
        self, prompt: Tensor, max_tokens: int, draw: Callable[[Tensor], Tensor], eos: int | None
    ) -> Iterator[str]:
        """Write after a prompt of ids, (1, T)."""
        T = prompt.shape[1]
        steps = min(max_tokens, self.config.context - T + 1)  # the last token is never read
        cache = Cache(self.config.layers, T + steps - 1)
        text = self.tokenizer.stream()
        for token in prompt[0].tolist():
            text.push(token)  # so that the first word written keeps the space before it
        new = prompt
        for _ in range(steps):
            new = self._agree(draw(self._score(new, cache, slice(-1, None))))[:, None]  # (1, 1)
            token = int(new)
            if token == eos:
                break
            yield text.push(token)
        yield text.flush()

    def _checked(self, ids: Sequence[int]) -> Tensor:
        """Put one row of ids onto the model's device, (1, T)."""
        context, V = self.config.context, self.config.vocabulary
        if not 1 <= len(ids) <= context:
            raise UsageError(
                f"{len(ids)} tokens, BOS included: the model reads 1 to {context} at a time"
            )
        if not 0 <= min(ids) <= max(ids) < V:
            raise UsageError(f"ids from {min(ids)} to {max(ids)}: the model knows 0 to {V - 1}")
        return torch.tensor([list(ids)], device=self.model.head_weight.device)

    def _score(
        self, tokens: Tensor, cache: Cache | None = None, where: slice = slice(None)
    ) -> Tensor:
        """Read one row, (1, T), and score what follows its tokens `where` it matters, (., V)."""
        with self._reading():
            hidden = self.model(tokens, cache=cache)  # (1, T, D)
            return self.model.logits(hidden[0, where])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Run the model for its scores alone."""
        assert not self.model.training, "call model.eval() first: dropout would write along"
        # a compiled block would be compiled anew for each length of the cache
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
