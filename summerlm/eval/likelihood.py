"""How likely a model finds continuations of contexts: what multiple-choice tasks ask.

Flow:
    1. `answer` checks its asks, cuts each from the left to the model's context, and asks only once
       what is asked several times;
    2. `sharing.plan` lays them into passes that read what they share once, and `sharing.deal` gives
       each rank its part;
    3. `_read` makes the passes; scores are made only of the positions that are asked about.

Shapes: B rows, T positions, D width, V vocabulary, N positions asked about, A answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from summerlm.core.errors import UsageError
from summerlm.core.ranks import ALONE, Ranks
from summerlm.eval.sharing import Batch, Query, Unit, deal, plan
from summerlm.eval.windows import LOGIT_ROWS
from summerlm.generate.cache import Cache
from summerlm.model.config import ModelConfig
from summerlm.model.kernels import Memory
from summerlm.model.packed import scoring
from summerlm.model.transformer import Transformer

BATCH_TOKENS = {"cpu": 1024}  # positions of a pass: a CPU's caches hold few
BATCH_TOKENS_ELSEWHERE = 32768


@dataclass(frozen=True)
class Ask:
    """A question: how likely is this continuation after this context?

    Attributes:
        context: Ids, with BOS in front; at least one.
        continuation: Ids; at least one, and no more than the model reads.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a model says to an `Ask`.

    Attributes:
        logprob: Log-probability of the whole continuation, in nats.
        greedy: Whether each of its tokens is the likeliest there.
    """

    logprob: float
    greedy: bool


def answer(
    model: Transformer,
    asks: Sequence[Ask],
    *,
    batch_tokens: int | None = None,
    precision: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> list[Answer]:
    """Score continuations.

    What is longer than the model's context loses its beginning, as in lm-eval: of context and
    continuation the last `config.context + 1` ids count, of which the very last isn't read.

    Args:
        model: The model, on any device; dropout is off meanwhile.
        asks: Any number, in any order; sharing is found, not told.
        batch_tokens: Positions of a pass; None = as many as suit the device.
        precision: Autocast's dtype; None = the weights' own.
        ranks: Who shares the work: every rank calls this with the same asks.

    Returns:
        An answer to each, in the order of the asks, the same on all ranks.

    Raises:
        UsageError: If an ask has no context, no continuation, a continuation longer than the
            model's context, or ids that the model doesn't know.
    """
    for number, ask in enumerate(asks):
        _check(ask, number, model.config)
    device = model.head_weight.device
    if batch_tokens is None:
        batch_tokens = pass_tokens(device)
    read = model.config.context + 1
    cut = [((*ask.context, *ask.continuation)[-read:], len(ask.continuation)) for ask in asks]
    slots = {key: slot for slot, key in enumerate(dict.fromkeys(cut))}
    queries = [Query(slot, *key) for key, slot in slots.items()]
    hands = deal(plan(queries, batch_tokens, ranks.world), ranks.world)
    totals = Totals(*torch.zeros(2, len(slots), dtype=torch.float64, device=device))
    with scoring(model, precision):
        for unit in hands[ranks.rank]:
            _read(model, unit, totals, device)
        passes = [sum(unit.passes for unit in hand) for hand in hands]
        for _ in range(max(passes) - passes[ranks.rank]):
            # a sharded model is read by all ranks, each time
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))
    nats, misses = (ranks.sum(total).tolist() for total in totals)
    found = [Answer(-n, m == 0) for n, m in zip(nats, misses, strict=True)]
    return [found[slots[key]] for key in cut]


def pass_tokens(device: torch.device) -> int:
    """Tell how many positions of a pass suit a device."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS_ELSEWHERE)


class Totals(NamedTuple):
    """Sums over the tokens of each answer."""

    nats: Tensor  # (A,), float64
    misses: Tensor  # (A,), float64: tokens that aren't the likeliest


def _check(ask: Ask, number: int, config: ModelConfig) -> None:
    """Refuse what has no answer."""
    if not ask.context:
        raise UsageError(f"ask {number}: the context is empty; it should hold at least BOS")
    if not ask.continuation:
        raise UsageError(f"ask {number}: the continuation is empty; there is nothing to score")
    if len(ask.continuation) > config.context:
        raise UsageError(
            f"ask {number}: the continuation has {len(ask.continuation)} tokens, "
            f"the model reads {config.context}"
        )
    low, high = (f((f(ask.context), f(ask.continuation))) for f in (min, max))
    if not 0 <= low <= high < config.vocabulary:
        raise UsageError(
            f"ask {number}: ids from {low} to {high}; the model knows 0 to {config.vocabulary - 1}"
        )


def _read(model: Transformer, unit: Unit, totals: Totals, device: torch.device) -> None:
    """Make the passes of a unit."""
    cache: Sequence[Memory] | None = None
    if unit.prefix:
        memory = Cache(model.config.layers, len(unit.prefix))
        model(torch.tensor([unit.prefix], device=device), cache=memory)
        cache = memory.share()
    for batch in unit.batches:
        tokens, branches = batch.tensors()
        # where nothing branches GPUs have faster kernels; on CPUs the one for branches is fastest
        plain = device.type != "cpu" and cache is None and not any(r.branches for r in batch.rows)
        places, targets = _targets(batch, tokens.shape[1])
        hidden = model(
            tokens.to(device),
            cache=cache,
            branches=None if plain else type(branches)(*(t.to(device) for t in branches)),
            asked=places.to(device),
        )
        _score(model, hidden, targets, totals)


def _targets(batch: Batch, T: int) -> tuple[Tensor, Tensor]:
    """Number the places that are asked about; several targets may follow one.

    Args:
        batch: The batch.
        T: Positions of a row, padding included.

    Returns:
        The places among all B * T, (N,), and for each target the number of its place, its id and
        the slot of its answer, (targets, 3), both int64.
    """
    numbers: dict[int, int] = {}
    found = []
    for number, row in enumerate(batch.rows):
        for place, token, slot in row.targets:
            found.append((numbers.setdefault(number * T + place, len(numbers)), token, slot))
    return torch.tensor(list(numbers)), torch.tensor(found)


def _score(model: Transformer, hidden: Tensor, targets: Tensor, totals: Totals) -> None:
    """Add up what hidden states, (N, D), say to targets, (targets, 3)."""
    device = hidden.device
    for start in range(0, len(hidden), LOGIT_ROWS):
        logits = model.logits(hidden[start : start + LOGIT_ROWS])  # (up to LOGIT_ROWS, V)
        own = targets[(targets[:, 0] >= start) & (targets[:, 0] < start + LOGIT_ROWS)].to(device)
        numbers_here, tokens, slots = own.unbind(1)
        numbers_here = numbers_here - start
        scores = logits.log_softmax(-1)
        likely = scores[numbers_here, tokens].double()
        missed = scores.argmax(-1)[numbers_here] != tokens
        totals.nats.index_add_(0, slots, -likely)
        totals.misses.index_add_(0, slots, missed.double())
