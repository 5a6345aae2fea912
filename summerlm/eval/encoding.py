"""Texts to asks: which ids are the context and which the continuation.

Flow: tasks give pairs of strings; `encode_pairs` makes an `Ask` of each, which
`likelihood.answer` takes.

The rule is that of lm-eval's Hugging Face class with BOS in front, so that figures can be compared:
spaces at the context's end go to the continuation; the ids of both together are cut after as many
as the context alone has.

Source: Gao et al., Language Model Evaluation Harness, github.com/EleutherAI/lm-evaluation-harness,
function _encode_pair of lm_eval/api/model.py.
"""

from collections.abc import Sequence

from summerlm.core.errors import UsageError
from summerlm.eval.likelihood import Ask
from summerlm.tokenizer.tokenizer import Tokenizer


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Ask:
    """Turn one context and one continuation into an ask; see `encode_pairs`.

    Args:
        tokenizer: The model's tokenizer.
        context: What the model reads first; may be empty.
        continuation: What it is asked about.

    Returns:
        The ask.

    Raises:
        UsageError: If no id is left for the continuation.
    """
    return encode_pairs(tokenizer, [(context, continuation)])[0]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Ask]:
    """Turn contexts and continuations into asks, each text encoded once.

    Args:
        tokenizer: The model's tokenizer.
        pairs: Contexts, which may be empty (BOS alone is then read), and continuations.

    Returns:
        An ask for each pair, with BOS in front of the context.

    Raises:
        UsageError: If no id is left for a continuation.

    Example:
        >>> from summerlm.tokenizer.learn import learn_bpe
        >>> tokenizer = learn_bpe([], 263)  # an id a byte
        >>> ask = encode_pair(tokenizer, "1 + 1 = ", "2")
        >>> tokenizer.decode(ask.context), tokenizer.decode(ask.continuation)
        ('1 + 1 =', ' 2')
    """
    moved = [_move_spaces(context, continuation) for context, continuation in pairs]
    wholes = [context + continuation for context, continuation in moved]
    texts = list(dict.fromkeys([context for context, _ in moved] + wholes))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    asks = []
    for (context, continuation), whole in zip(moved, wholes, strict=True):
        rest = ids[whole][len(ids[context]) :]
        if not rest:
            raise UsageError(
                f"the continuation {continuation!r} has no token of its own after the context "
                f"{context[-40:]!r}: it is empty, or its characters belong to the context's tokens"
            )
        asks.append(Ask((tokenizer.bos, *ids[context]), tuple(rest)))
    return asks


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Move the white space at the context's end to the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
