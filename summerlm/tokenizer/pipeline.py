"""The two pipelines from text to ids, and the proof of what a pipeline promises.

Flow:
    1. `mistral` fills `space_pipeline`, `learn` trains `byte_pipeline`: a BPE model with the
       steps before it that turn text into its first symbols;
    2. `tokenizer.Tokenizer`, new or read from a file, has `read_definition` take the pipeline
       apart again and refuse any that would lose a byte of text or let text make a special id.

The space pipeline is sentencepiece's: U+2581 stands for each space and for one in front of the
text, and a character that the vocabulary lacks becomes its UTF-8 bytes, `<0x00>` to `<0xFF>`.
The byte pipeline is GPT-2's: a pattern splits the text, then a visible character stands for
each byte. Neither drops, folds or trims anything.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

BOS, EOS = "<s>", "</s>"
ADDED = ("<p>", "<think>", "</think>", "<doc>", "</doc>")  # SummerLM's own, in this order

SPACE = "\u2581"  # what sentencepiece writes for a space
BYTE_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def space_pipeline(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Backend:
    """Build sentencepiece's way from text to ids.

    Args:
        vocabulary: Id of each piece.
        merges: Pairs of pieces that become one, the first in the list going first.

    Returns:
        The pipeline, without special tokens.
    """
    backend = Backend(BPE(dict(vocabulary), list(merges), byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def byte_pipeline(pattern: str) -> Backend:
    """Build the byte-level way from text to ids, its model still to be trained.

    Args:
        pattern: Regular expression; no merge crosses the borders of its matches.

    Returns:
        The pipeline, with an empty vocabulary.
    """
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


@dataclass(frozen=True)
class Definition:
    """What a pipeline's ids stand for.

    Attributes:
        token_bytes: Bytes of text of each id; none for a special id.
        specials: Id of each special token.
        pattern: Regular expression of the byte pipeline; None for the space pipeline.
        space_in_front: Whether a text's first id carries a space that the text doesn't have.
        fingerprint: SHA-256 in hexadecimal of all that decides ids.
    """

    token_bytes: tuple[bytes, ...]
    specials: dict[str, int]
    pattern: str | None
    space_in_front: bool
    fingerprint: str


def read_definition(backend: Backend) -> Definition:
    """Take a pipeline apart and prove that text stays text.

    Args:
        backend: The pipeline, of any origin.

    Returns:
        What its ids stand for.

    Raises:
        ValueError: If it is neither of the two pipelines, or its vocabulary has gaps, lacks a
            byte or a needed special token, or lets text make a special id.
    """
    ids = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(ids))):
        raise ValueError("its ids don't count from 0, each once")
    definition = json.loads(backend.to_str())
    pattern = _split_pattern(definition)
    model, added = definition["model"], definition["added_tokens"]
    specials = {token["content"]: token["id"] for token in added}
    if missing := {BOS, EOS} - specials.keys():
        raise ValueError(f"it lacks the special tokens {sorted(missing)}")
    if not all(token["special"] for token in added):
        raise ValueError("it has added tokens that aren't special, so that text could make them")

    symbols = BYTE_PIECES if pattern is None else _BYTE_CHARACTERS
    if missing := (symbols.keys() - ids.keys()) | (symbols.keys() & specials.keys()):
        raise ValueError(f"it has no ordinary token for {len(missing)} of the 256 bytes")
    unmade = specials.keys() | BYTE_PIECES.keys() if pattern is None else specials.keys()
    made = {left + right for left, right in model["merges"]} | {t for t in tokens if len(t) == 1}
    if wrong := unmade & made:
        raise ValueError(f"text could make its token {min(wrong)!r}")

    decisive = json.dumps([pattern, tokens, model["merges"], sorted(specials)])
    return Definition(
        token_bytes=tuple(
            b"" if token in specials else _bytes_of(token, pattern is None) for token in tokens
        ),
        specials=specials,
        pattern=pattern,
        space_in_front=pattern is None,
        fingerprint=hashlib.sha256(decisive.encode()).hexdigest(),
    )


def _split_pattern(definition: Mapping[str, Any]) -> str | None:
    """Find the byte pipeline's pattern; None for the space pipeline, an error for others."""
    if definition["pre_tokenizer"] is None:
        pattern, ours = None, space_pipeline({}, [])
    else:
        try:
            pattern = definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        except (KeyError, IndexError):
            raise ValueError("it isn't a pipeline that SummerLM makes") from None
        ours = byte_pipeline(pattern)
    # through the library on both sides, so that a field which a later release adds is on both
    if _steps(definition) != _steps(json.loads(ours.to_str())):
        raise ValueError("it isn't a pipeline that SummerLM makes")
    return pattern


def _steps(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Give all of a definition but the vocabulary."""
    model = {k: v for k, v in definition["model"].items() if k not in ("vocab", "merges")}
    return {k: v for k, v in definition.items() if k not in ("added_tokens", "model")} | model


def _bytes_of(token: str, space_pipeline: bool) -> bytes:
    if space_pipeline:
        return BYTE_PIECES.get(token) or token.replace(SPACE, " ").encode()
    try:
        return b"".join(_BYTE_CHARACTERS[character] for character in token)
    except KeyError:
        raise ValueError(f"its token {token!r} stands for no bytes") from None


def _byte_characters() -> dict[str, bytes]:
    """Map the visible characters that the byte pipeline writes for bytes, to the bytes.

    Source:
        Radford et al. 2019 (GPT-2), `bytes_to_unicode` in encoder.py of their code.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    codes = [*visible, *range(0x100, 0x100 + len(hidden))]
    return {chr(c): bytes([b]) for c, b in zip(codes, visible + hidden, strict=True)}


_BYTE_CHARACTERS = _byte_characters()
