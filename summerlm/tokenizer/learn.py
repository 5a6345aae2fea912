"""Learn a byte-level BPE from text.

Flow: `recipes` call `learn_bpe` with a stream of training texts and save what it returns.
"""

from collections.abc import Iterable, Iterator

from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer

from summerlm.core.errors import UsageError
from summerlm.tokenizer.pipeline import ADDED, BOS, EOS, byte_pipeline
from summerlm.tokenizer.tokenizer import Tokenizer, refuse_lone_surrogates

# No token crosses the borders of these matches. As in GPT-4's: a word takes one character before
# it, so that " the", "_name" and "(self" can be tokens; punctuation takes the line's end; and a
# run of spaces stands by itself, so that a line's indentation is one token.
SPLIT = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+\p{L}++",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_SPECIALS = (BOS, EOS, *ADDED)


def learn_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learn which byte sequences deserve an id.

    The same texts in the same order give the same tokenizer. Pairs that occur only once are not
    merged: they would be learned by heart.

    Args:
        texts: Training texts; read once.
        vocabulary: Number of ids V, 263 or more: 7 special ones, one a byte, the rest merges.

    Returns:
        A tokenizer of exactly V ids, which encodes any text.

    Raises:
        UsageError: If V is too small, or too large for what the texts can teach.
        LoneSurrogateError: If a text has no UTF-8 form.

    Source:
        Sennrich et al. 2016, arXiv:1508.07909; over bytes: Radford et al. 2019 (GPT-2).
    """
    smallest = len(_SPECIALS) + 256
    if vocabulary < smallest:
        raise UsageError(
            f"vocabulary = {vocabulary}: should be at least {smallest}, "
            f"for 256 bytes and {len(_SPECIALS)} special tokens"
        )
    backend = byte_pipeline(SPLIT)
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_checked(texts), trainer)
    if (learned := backend.get_vocab_size()) < vocabulary:
        raise UsageError(
            f"vocabulary = {vocabulary}: the texts are too small, they teach only {learned} ids; "
            f"give more text or ask for {learned}"
        )
    return Tokenizer(backend)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        refuse_lone_surrogates(text)
        yield text
