"""Mistral-7B-Instruct v0.3's vocabulary, extended by SummerLM's special tokens.

Flow: `registry` calls `mistral_v3` for the name "mistral-v3". The vocabulary is a sentencepiece
file that the `mistral-common` package ships; nothing is downloaded.
"""

import hashlib
from collections.abc import Mapping
from importlib import resources

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken

from summerlm.core.errors import UsageError
from summerlm.tokenizer.pipeline import ADDED, space_pipeline
from summerlm.tokenizer.tokenizer import Tokenizer

_FILE = "mistral_instruct_tokenizer_240323.model.v3"
_SHA256 = "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33"


def mistral_v3() -> Tokenizer:
    """Build the tokenizer of the original SummerLM-4B.

    Returns:
        A tokenizer of 32,773 ids: Mistral's 32,768, then `ADDED`. Its ids are sentencepiece's,
        but that the 20 pieces `[REFERENCE_DOC_n]`, which sentencepiece finds in text, are
        special here and so never come from text.

    Raises:
        UsageError: If the vocabulary file is missing or isn't the one that ids are pinned to.
    """
    sp = SentencePieceProcessor(model_proto=_read_vocabulary())
    pieces = sp.id_to_piece(list(range(sp.get_piece_size())))
    # only pieces that were learned from text have a score; all others have 0
    scores = {piece: sp.get_score(i) for i, piece in enumerate(pieces) if sp.get_score(i)}
    backend = space_pipeline({piece: i for i, piece in enumerate(pieces)}, _merges(scores))
    specials = [p for i, p in enumerate(pieces) if p not in scores and not sp.is_byte(i)]
    backend.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in (*specials, *ADDED)]
    )
    return Tokenizer(backend)


def _read_vocabulary() -> bytes:
    file = resources.files("mistral_common") / "data" / _FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: can't be read; install mistral-common anew: {error}") from None
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise UsageError(f"{file}: not Mistral v3's vocabulary; install mistral-common anew")
    return data


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Order all pairs of pieces that make a piece as sentencepiece takes them.

    It merges the pair with the best-scored result, and of equals the leftmost. Scores are equal
    between runs of spaces, and between the ways to make one piece: there, a longer left part
    stands for "leftmost", for it is the run that has grown from the left.

    Args:
        scores: Score of each learned piece.

    Returns:
        The pairs, first to merge first.
    """
    merges = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(merges, key=lambda pair: (-scores["".join(pair)], -len(pair[0])))
